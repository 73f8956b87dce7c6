"""The pipeline: malformed, oversized and excess requests, timeouts, and internal errors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from chathistory.v1 import chat_history_service_pb2, message_pb2, user_pb2
from google.protobuf.struct_pb2 import Value
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.server import Server
from service.store import sessions
from tests.conftest import StartProcess
from tests.support import commit_faults, failures
from tests.support.chat import Chat, new_id, new_message
from tests.support.cluster import Cluster, fetch, wait_until_idle
from tests.support.servers import ServerProcess, channel, connected, serving
from tests.support.statements import database_name

_SERVICE = chat_history_service_pb2.DESCRIPTOR.services_by_name["ChatHistoryService"]
METHODS = [
    (f"/{_SERVICE.full_name}/{method.name}", method.server_streaming) for method in _SERVICE.methods
]
SECRET = "postgresql://somebody:s3cr3t@db.example/chat"


def _call(opened: Any, path: str, *, streaming: bool, data: bytes, **options: Any) -> Any:
    """Call a method with arbitrary bytes."""
    if streaming:
        return opened.unary_stream(path)(data, **options).read()
    return opened.unary_unary(path)(data, **options)


@asynccontextmanager
async def locked(cluster: Cluster, database_url: str, *tables: str) -> AsyncGenerator[Any]:
    """Lock tables, so that every statement that reads or writes them waits."""
    holder = await cluster.connect(database_name(database_url))
    try:
        async with holder.transaction():
            await holder.execute(f"LOCK TABLE {', '.join(tables)} IN ACCESS EXCLUSIVE MODE")
            yield holder
    finally:
        await holder.close()


async def waiting(holder: Any, count: int = 1) -> None:
    """Wait until `count` statements wait for a lock."""
    async with asyncio.timeout(20):
        while await holder.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") < count:
            await asyncio.sleep(0.01)


# --- Malformed requests.


@pytest.mark.case(n=1)
async def test_invalid_bytes_are_rejected_by_every_method(server: Server) -> None:
    async with channel(server.address) as opened:
        for path, streaming in METHODS:
            for data in (b"\x0a\x7f", b"\xff" * 40):
                await failures.assert_fails(
                    _call(opened, path, streaming=streaming, data=data), "MALFORMED_REQUEST"
                )


@pytest.mark.case(n=1)
async def test_text_that_is_not_utf8_is_rejected(server: Server) -> None:
    """It is tried in every text field of every request."""
    async with channel(server.address) as opened:
        for (path, streaming), method in zip(METHODS, _SERVICE.methods, strict=True):
            for field in method.input_type.fields:
                if field.type == field.TYPE_STRING:
                    data = _field(field.number, b"\xff\xfe")
                    await failures.assert_fails(
                        _call(opened, path, streaming=streaming, data=data), "MALFORMED_REQUEST"
                    )


@pytest.mark.case(n=1)
async def test_server_serves_calls_after_malformed_ones(server: Server, chat: Chat) -> None:
    async with channel(server.address) as opened:
        calls = [
            _call(opened, path, streaming=streaming, data=b"\xff" * n)
            for n in range(1, 20)
            for path, streaming in METHODS
        ]
        done = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, aio.AioRpcError) for result in done)
    await chat.start()


async def test_message_nested_too_deeply_is_rejected(server: Server, chat: Chat) -> None:
    value = Value(string_value="deep").SerializeToString()
    for _ in range(200):
        entry = _field(1, b"a") + _field(2, value)
        value = _field(5, _field(1, entry))
    metadata = _field(1, _field(1, b"a") + _field(2, value))
    request = _field(1, chat.user_id.encode()) + _field(2, _field(6, metadata))
    path = "/chathistory.v1.ChatHistoryService/CreateSession"
    async with channel(server.address) as opened:
        await failures.assert_field_violations(
            _call(opened, path, streaming=False, data=request), "session.metadata"
        )
    await chat.start()


def _field(number: int, data: bytes) -> bytes:
    """Encode a length-delimited field."""
    length, size = b"", len(data)
    while size > 0x7F:
        length += bytes((size & 0x7F | 0x80,))
        size >>= 7
    return bytes((number << 3 | 2,)) + length + bytes((size,)) + data


async def test_unknown_method_of_the_service_is_unimplemented(server: Server) -> None:
    async with channel(server.address) as opened:
        with pytest.raises(aio.AioRpcError) as caught:
            await _call(
                opened, "/chathistory.v1.ChatHistoryService/Nothing", streaming=False, data=b""
            )
    assert caught.value.code() == StatusCode.UNIMPLEMENTED


# --- Oversized and excess requests.


def _large(chat: Chat, session_id: str, size: int) -> message_pb2.AppendMessagesRequest:
    messages = [new_message("x" * 200_000) for _ in range(-(-size // 200_000))]
    return message_pb2.AppendMessagesRequest(
        user_id=chat.user_id, session_id=session_id, messages=messages
    )


@pytest.mark.case(n=3)
async def test_request_over_four_mebibytes_is_rejected(chat: Chat) -> None:
    session = await chat.create_session()
    async with asyncio.TaskGroup() as group:
        others = [group.create_task(chat.append(session.id, f"{n}")) for n in range(10)]
        failure = await failures.assert_fails(
            chat.stub.AppendMessages(_large(chat, session.id, 5 << 20)), "REQUEST_TOO_LARGE"
        )
        assert failure.code == StatusCode.RESOURCE_EXHAUSTED
        # Above the limit of gRPC itself, which answers without a reason.
        with pytest.raises(aio.AioRpcError) as caught:
            await chat.stub.AppendMessages(_large(chat, session.id, 20 << 20))
        assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
    assert all(other.done() for other in others)
    just_below = _large(chat, session.id, 4_000_000)
    assert 4_000_000 < just_below.ByteSize() < 4 << 20
    await chat.stub.AppendMessages(just_below)
    assert (await chat.get_session(session.id)).last_seq == 30


async def test_request_of_exactly_the_limit_is_accepted(server: Server) -> None:
    async with channel(server.address) as opened:
        path = "/chathistory.v1.ChatHistoryService/ListUsers"
        for size, reason in ((4 << 20, "MALFORMED_REQUEST"), ((4 << 20) + 1, "REQUEST_TOO_LARGE")):
            await failures.assert_fails(
                _call(opened, path, streaming=False, data=b"\xff" * size), reason
            )


@pytest.mark.case(n=3)
async def test_gzip_bomb_is_rejected(database_url: str, tmp_path: Path) -> None:
    """Some kilobytes on the wire are 150 MB decompressed, which the server must not keep."""
    async with ServerProcess(database_url, tmp_path / "server") as process:
        status = Path(f"/proc/{process.pid}/status")

        def resident_peak() -> int:
            [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            return int(line.split()[1]) * 1024

        async with channel(process.address, max_send_message_length=-1) as opened:
            before = resident_peak()
            data = message_pb2.AppendMessagesRequest(
                user_id=new_id(), messages=[message_pb2.Message(content="0" * (150 << 20))]
            ).SerializeToString()
            for _ in range(3):
                with pytest.raises(aio.AioRpcError) as caught:
                    await _call(
                        opened,
                        "/chathistory.v1.ChatHistoryService/AppendMessages",
                        streaming=False,
                        data=data,
                        compression=grpc.Compression.Gzip,
                    )
                assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
            assert resident_peak() - before < 50 << 20
        async with connected(process.address) as stub:
            await (await Chat.of_new_user(stub)).start()


@pytest.mark.case(n=3)
async def test_metadata_of_twenty_kilobytes_is_rejected(chat: Chat, server: Server) -> None:
    # Without these options the client would not send it: it learns the limit when it connects.
    async with channel(
        server.address, max_metadata_size=100_000, absolute_max_metadata_size=200_000
    ) as opened:
        path = "/chathistory.v1.ChatHistoryService/ListUsers"
        with pytest.raises(aio.AioRpcError) as caught:
            await _call(
                opened, path, streaming=False, data=b"", metadata=(("x-large", "y" * 20_000),)
            )
        assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
        await _call(opened, path, streaming=False, data=b"", metadata=(("x-small", "y" * 2_000),))
    await chat.start()


@pytest.mark.case(n=18)
async def test_calls_above_the_limit_are_overloaded(cluster: Cluster, database_url: str) -> None:
    async with serving(database_url, max_in_flight=5) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session = await chat.create_session()
        async with locked(cluster, database_url, "chat_sessions") as holder:
            held = [asyncio.create_task(chat.get_session(session.id)) for _ in range(5)]
            await waiting(holder, 1)
            while server.calls.in_flight < 5:
                await asyncio.sleep(0.01)
            for _ in range(3):
                refused = await failures.assert_fails(chat.get_session(session.id), "OVERLOADED")
                assert refused.retry_after
            async with channel(server.address) as opened:
                health: Any = health_pb2_grpc.HealthStub(opened)
                for name in ("", "liveness", "database"):
                    reply = await health.Check(
                        health_pb2.HealthCheckRequest(service=name), timeout=10
                    )
                    assert reply.status == health_pb2.HealthCheckResponse.SERVING
        await asyncio.gather(*held)
        await chat.get_session(session.id)


async def test_a_thousand_clients_share_the_pool(
    chat: Chat, server: Server, database_url: str
) -> None:
    session_ids = [await chat.start() for _ in range(10)]
    calls: list[Callable[[str], Any]] = [
        chat.get_session,
        chat.page,
        chat.context,
        lambda session_id: chat.append(session_id, "more"),
    ]
    most = 0

    async def count() -> None:
        nonlocal most
        while True:
            [[now]] = await fetch(
                database_url,
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'chat-history'",
            )
            most = max(most, now)
            await asyncio.sleep(0.02)

    counting = asyncio.create_task(count())
    await asyncio.gather(*(calls[n % 4](session_ids[n % 10]) for n in range(1000)))
    counting.cancel()
    await asyncio.wait([counting])
    assert 0 < most <= server.settings.db_pool_size + server.settings.db_max_overflow
    assert (await chat.get_session(session_ids[3])).last_seq == 1 + 50


# --- Timeouts and cancelled calls.


async def test_call_without_a_deadline_ends_at_the_servers_limit(
    cluster: Cluster, database_url: str
) -> None:
    async with serving(database_url, call_timeout=0.6) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        async with locked(cluster, database_url, "chat_sessions", "chat_messages"):
            # A statement that waits for a lock is repeated: it ends with the last answer, or at the
            # deadline.
            for call in (
                chat.get_session(session_id),
                chat.page(session_id),
                chat.update_session(["title"], id=session_id, title="new"),
                chat.append(session_id, "more"),
            ):
                failure = await failures.failure_of(call)
                assert failure.reason in ("DEADLINE_EXCEEDED", "CONTENTION")
        await chat.append(session_id, "more")


async def connections_at_rest(server: Server, database_url: str) -> int:
    """Return the number of connections that an idle service keeps, after a full load once more."""
    engine, target = server.database.engine, server.database.target
    pool: Any = engine.pool

    async def counted() -> int:
        if target.is_pooled:  # The connections to PostgreSQL are the pooler's.
            await wait_until_idle(database_url)
            own = psutil.Process().net_connections("tcp")
            return sum(
                connection.raddr[1:] == (target.url.port,)
                and connection.status == psutil.CONN_ESTABLISHED
                for connection in own
            )
        [[backends]] = await fetch(
            database_url,
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'chat-history'",
        )
        return int(backends)

    async with asyncio.timeout(40):
        while server.calls.in_flight or server.streams.in_flight or server.appender.queued_count:
            await asyncio.sleep(0.01)
        await server.database.writes_in_flight.drain()
        while pool.checkedout():  # The hot pool returns its idle connections after some seconds.
            await asyncio.sleep(0.05)
        async with AsyncExitStack() as all_of_them:
            most = server.settings.db_pool_size + server.settings.db_max_overflow
            opened = [await all_of_them.enter_async_context(engine.connect()) for _ in range(most)]
            assert pool.checkedout() == len(opened)
        assert pool.checkedout() == 0
        while await counted() != pool.checkedin():  # Overflow connections take a moment to close.
            await asyncio.sleep(0.05)
    [[idle]] = await fetch(
        database_url,
        # An active connection that waits for its client has prepared a statement and not run it.
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND (state LIKE 'idle in%' OR (state = 'active' AND wait_event = 'ClientRead'))",
    )
    assert idle == 0
    return int(pool.checkedin())


@pytest.mark.faults
@pytest.mark.case(n=5)
@pytest.mark.timeout(300)
async def test_cancelling_five_hundred_calls_leaks_no_connection(
    chat: Chat, server: Server, cluster: Cluster, database_url: str
) -> None:
    """Half are cancelled in mid-statement, the others at random moments.

    As many connections as before remain, in a usable state, and the garbage collector has no
    warning.
    """
    session_id = await chat.start()
    message_id = (await chat.append(session_id, [new_message("changed")])).messages[0].id

    async def followed() -> None:
        call = chat.watch(session_id)
        try:
            async for _ in call:
                pass
        finally:
            call.cancel()  # gRPC does that automatically only while the call waits for an answer.

    calls: list[Callable[[], Any]] = [
        lambda: chat.get_session(session_id),
        lambda: chat.page(session_id),
        lambda: chat.context(session_id),
        lambda: chat.append(session_id, "cancelled"),
        chat.list_sessions,
        lambda: chat.update_session(["title"], id=session_id, title="cancelled"),
        followed,
        lambda: chat.create_session(title="cancelled"),
        lambda: chat.append("", "cancelled"),
        lambda: chat.fork(session_id, 1),
        lambda: chat.update(session_id, message_id, ["content"], content="cancelled"),
    ]
    before = await connections_at_rest(server, database_url)
    for turn in range(10):
        async with locked(cluster, database_url, "chat_sessions", "chat_messages") as holder:
            begun = [asyncio.create_task(calls[(turn + n) % len(calls)]()) for n in range(50)]
            await waiting(holder, 3)
            for task in begun:
                task.cancel()
            await asyncio.wait(begun)
            assert all(task.cancelled() for task in begun)
        await (
            server.database.writes_in_flight.drain()
        )  # Writes are completed, and would hold the locks that the next calls wait for.
    moments = random.Random(5)
    for turn in range(10):
        begun = [asyncio.create_task(calls[(turn + n) % len(calls)]()) for n in range(50)]
        for task in begun:
            asyncio.get_running_loop().call_later(moments.uniform(0, 0.1), task.cancel)
        await asyncio.wait(begun)
        assert [
            task.exception() for task in begun if not task.cancelled() and task.exception()
        ] == []
    assert await connections_at_rest(server, database_url) == before
    await asyncio.gather(*(chat.append(session_id, "more") for _ in range(20)))
    await asyncio.gather(*(chat.page(session_id) for _ in range(20)))
    await asyncio.gather(*(chat.get_session(session_id) for _ in range(20)))


async def test_write_of_a_cancelled_call_is_completed(
    chat: Chat, server: Server, cluster: Cluster, database_url: str
) -> None:
    session = await chat.create_session()
    async with locked(cluster, database_url, "chat_sessions") as holder:
        left = asyncio.create_task(
            chat.update_session(["title"], id=session.id, title="all the same")
        )
        await waiting(holder)
        left.cancel()
        await asyncio.wait([left])
        async with asyncio.timeout(20):
            while server.calls.in_flight:
                await asyncio.sleep(0.01)
    await server.database.writes_in_flight.drain()
    assert (await chat.get_session(session.id)).title == "all the same"


# --- Internal errors.


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_cancellation_inside_a_method_is_answered(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """gRPC alone would send no status, and the client would wait until its deadline."""
    session_id = await chat.start()

    async def cancelled(*_args: object, **_options: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(sessions, "get", cancelled)
    call = chat.get_session(session_id) if kind == "unary" else chat.watch(session_id).read()
    async with asyncio.timeout(20):
        await failures.assert_fails(call, "INTERNAL")


@pytest.mark.case(n=4)
async def test_database_error_is_not_described_to_clients(
    start_process: StartProcess, database_url: str
) -> None:
    process = await start_process(CHAT_HISTORY_LOG_LEVEL="debug")
    async with connected(process.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await commit_faults.install(database_url)
        await commit_faults.arm(database_url, "23514", 1)
        failure = await failures.assert_fails(chat.append(session_id, "more"), "INTERNAL")
        assert failure.message == "internal error"
        assert set(failure.metadata) == {"request_id"}
        assert failure.metadata["request_id"] in process.log.read_text()
        assert "a fault of the tests" not in process.log.read_text()
        await fetch(database_url, "ALTER TABLE chat_messages RENAME COLUMN content TO s3cr3t")
        for call in (
            chat.page(session_id),
            chat.append(session_id, "more"),
            chat.watch(session_id).read(),
        ):
            failure = await failures.assert_fails(call, "DATABASE_UNAVAILABLE")
            assert "content" not in failure.message
            assert not failure.metadata
        log = process.log.read_text()
        assert log.count('"database error"') == 1
        assert "42703" in log
        assert "s3cr3t" not in log
        await chat.get_session(session_id)


_SABOTAGE = f"""
import sys
from service.store import sessions
from tests.support.serve import main
async def get(*args, **options):
    raise RuntimeError({SECRET!r}) from ValueError({SECRET!r})
sessions.get = get
main()
"""


@pytest.mark.case(n=4)
async def test_connection_string_in_an_exception_reaches_no_client_or_log(
    database_url: str, tmp_path: Path
) -> None:
    """The log is that of a server process at level debug."""
    process = ServerProcess(
        database_url, tmp_path / "server", command=("-c", _SABOTAGE), CHAT_HISTORY_LOG_LEVEL="debug"
    )
    async with process, connected(process.address) as stub:
        created = await stub.CreateUser(
            user_pb2.CreateUserRequest(user=user_pb2.User(name="somebody"))
        )
        chat = Chat(stub, created.user.id)
        for call in (chat.get_session(new_id()), chat.watch(new_id()).read()):
            with pytest.raises(aio.AioRpcError) as caught:
                await call
            error = caught.value
            failure = failures.read_failure(error)
            assert (failure.reason, failure.message) == ("INTERNAL", "internal error")
            sent = (
                f"{error.details()} {error.debug_error_string()} "
                f"{error.trailing_metadata()} {error.initial_metadata()}"
            )
            assert "s3cr3t" not in sent
            assert "Runtime" not in sent
            log = process.log.read_text()
            assert failure.metadata["request_id"] in log
            assert "RuntimeError" in log
            assert "s3cr3t" not in log
