"""Start and shutdown: no acknowledged append is lost, no caller hangs, one server has the port."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from chathistory.v1 import message_pb2
from google.protobuf import descriptor_pb2
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service import server as server_module
from service.server import Server
from tests.conftest import StartProcess
from tests.support import failures
from tests.support.chat import Chat, new_id, new_message
from tests.support.cluster import Cluster
from tests.support.history import History, read_valid_history
from tests.support.servers import ServerProcess, channel, connected, serving, target_of
from tests.support.servers import settings as server_settings
from tests.support.statements import database_name

pytestmark = pytest.mark.faults  # Servers start and stop.


class Writer:
    """Appends messages to a session of its own, and records the acknowledged ones."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.session_id = new_id()
        self.acknowledged: list[message_pb2.AppendMessagesResponse] = []
        self.sent: list[str] = []
        self.failed: list[aio.AioRpcError] = []

    async def write(self) -> None:
        """Write until a call fails."""
        while True:
            message = new_message(f"{len(self.sent)}")
            self.sent.append(message.id)
            try:
                self.acknowledged.append(
                    await self.chat.append(self.session_id, [message], create_if_missing=True)
                )
            except aio.AioRpcError as error:
                self.failed.append(error)
                return

    def check(self, history: History) -> None:
        """Assert that all acknowledged messages are stored, and no message that was not sent."""
        history.check_contains(self.acknowledged)
        stored = [message.id for message in history.messages]
        assert stored == self.sent[: len(stored)]
        assert len(stored) - len(self.acknowledged) <= 1


async def exhaust(replies: AsyncIterator[object]) -> None:
    async for _ in replies:
        pass


@pytest.mark.case(n=17)
async def test_sigterm_under_load_loses_no_acknowledged_append(
    start_process: StartProcess, database_url: str
) -> None:
    process = await start_process(CHAT_HISTORY_SHUTDOWN_GRACE="60")
    async with connected(process.address) as stub:
        chat = await Chat.of_new_user(stub)
        writers = [Writer(chat) for _ in range(12)]
        writing = [asyncio.create_task(writer.write()) for writer in writers]
        while any(len(writer.acknowledged) < 5 for writer in writers):
            await asyncio.sleep(0.01)
        replies = aiter(chat.watch(writers[0].session_id))
        await anext(replies)
        process.send_signal(signal.SIGTERM)
        # Long before the end of the grace: an open stream must not use it up.
        async with asyncio.timeout(30):
            await asyncio.gather(*writing)
            with pytest.raises(aio.AioRpcError) as ended:
                await exhaust(replies)
            assert await process.wait() == 0
        assert failures.read_failure(ended.value).reason == "DRAINING"
    for writer in writers:
        assert [error.code() for error in writer.failed] == [StatusCode.UNAVAILABLE]
        writer.check(await read_valid_history(database_url, chat.user_id, writer.session_id))
    assert "Traceback" not in process.log.read_text()


@pytest.mark.case(n=17)
async def test_calls_repeated_during_shutdown_never_end_with_cancelled(
    start_process: StartProcess,
) -> None:
    """gRPC answers calls to a stopping server with CANCELLED, which clients do not retry."""
    process = await start_process()
    codes: list[StatusCode] = []
    async with connected(process.address) as stub:
        chat = await Chat.of_new_user(stub)
        stopped = asyncio.Event()

        async def call_repeatedly() -> None:
            while not stopped.is_set():
                try:
                    await chat.list_sessions()
                except aio.AioRpcError as error:
                    codes.append(error.code())

        callers = [asyncio.create_task(call_repeatedly()) for _ in range(24)]
        await asyncio.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        stopped.set()
        await asyncio.gather(*callers)
    assert set(codes) == {StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_idle_server_stops_immediately(
    start_process: StartProcess, number: signal.Signals
) -> None:
    process = await start_process(CHAT_HISTORY_SHUTDOWN_GRACE="60")
    async with connected(process.address) as stub:
        await Chat.of_new_user(stub)
        process.send_signal(number)
        async with asyncio.timeout(30):
            assert await process.wait() == 0


async def test_signal_before_readiness_stops_the_server(
    empty_database_url: str, tmp_path: Path
) -> None:
    async with asyncio.timeout(60):
        process = ServerProcess(empty_database_url, tmp_path / "server")
        await process.start(ready=False)
        while "not ready" not in (process.log.read_text() if process.log.exists() else ""):
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        await process.stop()


async def test_calls_in_flight_finish_and_new_calls_are_draining(
    database_url: str, cluster: Cluster
) -> None:
    holder = await cluster.connect(database_name(database_url))
    try:
        async with (
            serving(database_url, shutdown_grace=30.0) as server,
            connected(server.address) as stub,
        ):
            chat = await Chat.of_new_user(stub)
            session = await chat.create_session()
            async with holder.transaction():
                await holder.execute("LOCK TABLE chat_sessions IN ACCESS EXCLUSIVE MODE")
                in_flight = [asyncio.create_task(chat.append(session.id, f"{n}")) for n in range(5)]
                update = chat.update_session(["title"], id=session.id, title="new")
                in_flight.append(asyncio.create_task(update))  # type: ignore[arg-type]
                while server.calls.in_flight < len(in_flight):
                    await asyncio.sleep(0.01)
                stopping = asyncio.create_task(server.stop())
                while not server.calls.is_draining:
                    await asyncio.sleep(0.01)
                with pytest.raises(aio.AioRpcError) as refused:
                    await chat.get_session(session.id)
                assert refused.value.code() == StatusCode.UNAVAILABLE
                assert not stopping.done()
            replies = await asyncio.gather(*in_flight)
            await stopping
            history = await read_valid_history(database_url, chat.user_id, session.id)
            history.check_contains(replies[:5])
            assert history.last_seq == 5
    finally:
        await holder.close()


@pytest.mark.case(n=17)
async def test_sequential_caller_gets_draining_at_shutdown(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At shutdown a server in use may have no call in flight; gRPC would cancel the next call."""
    monkeypatch.setattr(
        server_module, "REFUSE_BEFORE_CLOSE_S", 1.0
    )  # On a busy machine the next call may be late.
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        stopping = asyncio.create_task(server.stop())
        while not server.calls.is_draining:
            await asyncio.sleep(0)
        assert not server.calls.in_flight
        with pytest.raises(aio.AioRpcError) as refused:
            await chat.list_sessions()
        assert (refused.value.code(), failures.read_failure(refused.value).reason) == (
            StatusCode.UNAVAILABLE,
            "DRAINING",
        )
        await stopping


async def test_health_is_not_serving_before_calls_are_rejected(database_url: str) -> None:
    """Calls are served during the shutdown delay, in which load balancers see NOT_SERVING."""
    async with (
        serving(database_url, shutdown_delay=3.0) as server,
        channel(server.address) as opened,
    ):
        health: Any = health_pb2_grpc.HealthStub(opened)
        async with connected(server.address) as stub:
            chat = await Chat.of_new_user(stub)
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0)
            reply = await health.Check(health_pb2.HealthCheckRequest())
            assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
            alive = await health.Check(health_pb2.HealthCheckRequest(service="liveness"))
            assert alive.status == health_pb2.HealthCheckResponse.SERVING
            await chat.start()
            assert not stopping.done()
            await stopping


async def test_calls_that_do_not_end_are_cancelled_after_the_grace(
    database_url: str, cluster: Cluster
) -> None:
    holder = await cluster.connect(database_name(database_url))
    try:
        async with (
            serving(database_url, shutdown_grace=0.5) as server,
            connected(server.address) as stub,
        ):
            chat = await Chat.of_new_user(stub)
            session = await chat.create_session()
            async with holder.transaction():
                await holder.execute("LOCK TABLE chat_sessions IN ACCESS EXCLUSIVE MODE")
                endless = [
                    asyncio.create_task(chat.get_session(session.id)),
                    asyncio.create_task(chat.append(session.id, "?")),
                    asyncio.create_task(chat.update_session(["title"], id=session.id, title="?")),
                ]
                while server.calls.in_flight < 3:
                    await asyncio.sleep(0.01)
                async with asyncio.timeout(30):
                    await server.stop()
                await asyncio.wait(endless)
            assert all(isinstance(task.exception(), aio.AioRpcError) for task in endless)
    finally:
        await holder.close()


async def test_second_server_on_the_same_port_fails(
    server: Server, database_url: str, tmp_path: Path
) -> None:
    second = Server(server_settings(listen=server.address), target_of(database_url))
    with pytest.raises(OSError, match="cannot listen"):
        await second.start()
    await second.stop()
    process = ServerProcess(database_url, tmp_path / "second", CHAT_HISTORY_LISTEN=server.address)
    await process.start(ready=False)
    process.send_signal(signal.SIGCONT)  # The fixture kills it.
    async with asyncio.timeout(30):
        assert await process.wait() != 0
    await process.stop()
    assert process.address == ""


async def test_restart_listens_on_the_same_port_immediately(
    database_url: str, tmp_path: Path
) -> None:
    """Connections of the previous server may remain; the next one must not wait for them."""
    async with ServerProcess(database_url, tmp_path / "first") as first:
        async with connected(first.address) as stub:
            chat = await Chat.of_new_user(stub)
            session_id = await chat.start()
            await first.kill()
        async with ServerProcess(
            database_url, tmp_path / "second", CHAT_HISTORY_LISTEN=first.address
        ) as second:
            assert second.address == first.address
            async with connected(second.address) as stub:
                assert (await Chat(stub, chat.user_id).get_session(session_id)).last_seq == 1


async def test_repeated_start_and_stop_leaves_nothing_running(database_url: str) -> None:
    for _ in range(3):
        async with serving(database_url) as server, connected(server.address) as stub:
            await Chat.of_new_user(stub)


async def test_stop_directly_after_start_succeeds(database_url: str) -> None:
    server = Server(server_settings(), target_of(database_url))
    await server.start()
    await server.stop()


async def test_reflection_serves_the_whole_api(server: Server) -> None:
    """A client that has only the address can read every message type."""
    async with channel(server.address) as opened:
        connection: Any = opened
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(connection)

        async def ask(**fields: Any) -> reflection_pb2.ServerReflectionResponse:
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(**fields))
            reply: reflection_pb2.ServerReflectionResponse = await call.read()
            await call.done_writing()
            with suppress(aio.AioRpcError):
                await call.read()
            return reply

        services = {
            service.name for service in (await ask(list_services="")).list_services_response.service
        }
        assert services >= {"chathistory.v1.ChatHistoryService", "grpc.health.v1.Health"}
        files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
        history = await ask(file_containing_symbol="chathistory.v1.ChatHistoryService")
        todo = list(history.file_descriptor_response.file_descriptor_proto)
        while todo:
            file = descriptor_pb2.FileDescriptorProto.FromString(todo.pop())
            files[file.name] = file
            for name in file.dependency:
                if name not in files:
                    answer = await ask(file_by_filename=name)
                    assert not answer.HasField("error_response"), name
                    todo += answer.file_descriptor_response.file_descriptor_proto
        assert {"chathistory/v1/message.proto", "buf/validate/validate.proto"} <= files.keys()
