"""SIGTERM ends the process on time, even if a client or a dependency does not respond."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from chathistory.v1 import document_pb2, message_pb2, user_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from service.process import EXIT_TIMEOUT_S
from tests.conftest import StartProcess
from tests.faults.conftest import calls_by_route
from tests.support.chat import Chat, new_message
from tests.support.issuer import AUDIENCE, ISSUER, service_token
from tests.support.proxy import Proxy, postgres_proxy
from tests.support.servers import ServerProcess, channel, connected

pytestmark = [pytest.mark.case(n=17), pytest.mark.timeout(180)]

LONG_GRACE_S, GRACE_S = 90, 2


async def assert_shuts_down(process: ServerProcess, timeout_s: float) -> None:
    """Send SIGTERM and assert that the server shuts down in order.

    After `timeout_s` and some seconds for a busy machine, the process is killed.
    """
    process.send_signal(signal.SIGTERM)
    try:
        # A process that is late is ended by the watchdog (`EXIT_TIMEOUT_S`), with another code.
        code = await process.wait(timeout_s + 20)
    except subprocess.TimeoutExpired:
        await process.kill()
        raise
    log = process.log.read_text()
    assert code == 0, log
    assert "Traceback" not in log


# --- Clients that must not delay the shutdown for the whole grace period.

Clients = Callable[[str], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def silent_connections(address: str) -> AsyncGenerator[None]:
    """Open connections that send nothing, or nothing after the HTTP/2 preface."""
    host, _, port = address.rpartition(":")
    writers = []
    for data in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        writers.append(writer)
    await asyncio.sleep(0.3)
    yield
    for writer in writers:
        writer.transport.abort()


@asynccontextmanager
async def calls_without_a_request(address: str) -> AsyncGenerator[None]:
    """Open calls that gRPC has accepted and that no handler has received yet.

    Such calls also exist when a server receives SIGTERM just after it has accepted a call.
    """
    async with channel(address) as connection:
        untyped: Any = connection
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(untyped)
        calls = [reflection.ServerReflectionInfo()]
        calls += [
            untyped.stream_stream(f"/chathistory.v1.ChatHistoryService/{method}")()
            for method in ("GetSession", "AppendMessages", "WatchMessages")
        ]
        for call in calls:
            await call.wait_for_connection()
        await asyncio.sleep(0.5)
        yield


async def _follow(stack: AsyncExitStack, address: str) -> None:
    """Open streams with much data, and read none of it."""
    stub = await stack.enter_async_context(connected(address))
    chat = await Chat.of_new_user(stub)
    session_id = await chat.start()
    for _ in range(20):
        await chat.append(session_id, [new_message("x" * 200_000) for _ in range(5)])
    calls: list[Any] = [
        stub.WatchMessages(
            message_pb2.WatchMessagesRequest(user_id=chat.user_id, session_id=session_id)
        )
    ]
    health: Any = health_pb2_grpc.HealthStub(await stack.enter_async_context(channel(address)))
    calls.append(health.Watch(health_pb2.HealthCheckRequest()))
    for call in calls:
        await call.initial_metadata()
    await asyncio.sleep(0.5)


@asynccontextmanager
async def followers_that_do_not_read(address: str) -> AsyncGenerator[None]:
    async with AsyncExitStack() as stack:
        await _follow(stack, address)
        yield


@asynccontextmanager
async def followers_that_vanished(address: str) -> AsyncGenerator[None]:
    async with Proxy(address) as proxy, AsyncExitStack() as stack:
        await _follow(stack, proxy.address)
        proxy.block()
        yield
        proxy.reset_connections()


@pytest.mark.parametrize(
    "clients",
    [
        silent_connections,
        calls_without_a_request,
        followers_that_do_not_read,
        followers_that_vanished,
    ],
)
async def test_shutdown_does_not_wait_for_unresponsive_clients(
    start_process: StartProcess, clients: Clients
) -> None:
    process = await start_process(CHAT_HISTORY_SHUTDOWN_GRACE=str(LONG_GRACE_S))
    async with clients(process.address):
        await assert_shuts_down(process, LONG_GRACE_S / 2)


# --- Dependencies that do not respond: the shutdown may use the whole grace period.


@pytest.mark.parametrize("has_calls", [False, True], ids=["idle", "calls in flight"])
async def test_shutdown_ends_on_time_when_the_database_is_silent(
    start_process: StartProcess, database_url: str, has_calls: bool
) -> None:
    async with postgres_proxy(database_url) as (proxy, url):
        process = await start_process(url=url, CHAT_HISTORY_SHUTDOWN_GRACE=str(GRACE_S))
        async with connected(process.address) as stub:
            chat = await Chat.of_new_user(stub)
            session_id = await chat.start()
            # Opens many connections, each of which could delay the shutdown.
            routes = calls_by_route(chat, session_id).values()
            await asyncio.gather(*(call() for call in routes for _ in range(10)))
            proxy.block()
            calls = [asyncio.ensure_future(call()) for call in routes for _ in range(4 * has_calls)]
            await asyncio.sleep(0.5)
            await assert_shuts_down(process, GRACE_S + EXIT_TIMEOUT_S)
            if calls:
                await asyncio.wait(calls)
                assert all(call.exception() for call in calls)


async def test_shutdown_ends_on_time_when_the_database_never_answered(
    start_process: StartProcess, database_url: str
) -> None:
    async with postgres_proxy(database_url) as (proxy, url):
        proxy.block()
        process = await start_process(
            url=url, ready=False, CHAT_HISTORY_SHUTDOWN_GRACE=str(GRACE_S)
        )
        while "not ready" not in (process.log.read_text() if process.log.exists() else ""):
            await asyncio.sleep(0.02)
        await assert_shuts_down(process, GRACE_S + EXIT_TIMEOUT_S)


async def test_shutdown_ends_on_time_when_the_search_process_is_stuck(
    start_process: StartProcess,
) -> None:
    process = await start_process(
        CHAT_HISTORY_SHUTDOWN_GRACE=str(GRACE_S), CHAT_HISTORY_SEARCH="on"
    )
    async with connected(process.address) as stub, channel(process.address) as connection:
        health: Any = health_pb2_grpc.HealthStub(connection)
        chat = await Chat.of_new_user(stub)
        async with asyncio.timeout(60):
            while (await health.Check(health_pb2.HealthCheckRequest(service="search"))).status != 1:
                await asyncio.sleep(0.05)
        (child,) = psutil.Process(process.pid).children()
        child.suspend()
        document = document_pb2.Document(title="to be indexed")
        await stub.CreateDocument(
            document_pb2.CreateDocumentRequest(
                user_id=chat.user_id,
                document=document,
                chunks=[document_pb2.DocumentChunk(text="now")],
            )
        )
        searching = asyncio.ensure_future(
            stub.SearchDocuments(
                document_pb2.SearchDocumentsRequest(user_id=chat.user_id, query="now")
            )
        )
        await asyncio.sleep(0.5)
        await assert_shuts_down(process, GRACE_S + EXIT_TIMEOUT_S)
        await asyncio.wait([searching])
        async with asyncio.timeout(20):
            while _is_running(child):
                await asyncio.sleep(0.02)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_shutdown_ends_on_time_when_the_issuer_is_silent(start_process: StartProcess) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as issuer:
        process = await start_process(
            CHAT_HISTORY_SHUTDOWN_GRACE=str(GRACE_S),
            CHAT_HISTORY_AUTH="jwt",
            CHAT_HISTORY_JWKS_URL=f"http://127.0.0.1:{issuer.sockets[0].getsockname()[1]}/keys",
            CHAT_HISTORY_JWT_ISSUER=ISSUER,
            CHAT_HISTORY_JWT_AUDIENCE=AUDIENCE,
        )
        async with channel(process.address) as connection:
            bearer = (("authorization", f"Bearer {service_token(headers={'kid': 'unknown'})}"),)
            call = ChatHistoryServiceStub(connection).ListUsers(
                user_pb2.ListUsersRequest(), metadata=bearer
            )
            listing = asyncio.ensure_future(call)
            await asyncio.sleep(0.5)
            await assert_shuts_down(process, GRACE_S + EXIT_TIMEOUT_S)
            await asyncio.wait([listing])


# --- A shutdown that hangs.

_HANGS = """
import sys, time
from service import process, server
from tests.support import serve
process.EXIT_TIMEOUT_S = 1.0
async def stop(self):
    print("hangs", file=sys.stderr, flush=True)
    time.sleep(600)
server.Server.stop = stop
serve.main()
"""


async def test_hanging_shutdown_is_ended_and_its_stack_logged(
    database_url: str, tmp_path: Path
) -> None:
    hanging = ServerProcess(
        database_url, tmp_path / "server", command=("-c", _HANGS), CHAT_HISTORY_SHUTDOWN_GRACE="1"
    )
    await hanging.start()
    hanging.send_signal(signal.SIGTERM)
    assert await hanging.wait(60) == 1
    await hanging.stop()
    log = hanging.log.read_text()
    assert log.index("hangs") < log.index("Timeout") < log.index("in stop")
