"""Connections that do nothing, and those that are too many."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from service.rpc import connections
from service.server import Server
from tests.support.certificates import CertificateAuthority, write_tls_files
from tests.support.chat import Chat
from tests.support.raw_http2 import RawConnection
from tests.support.servers import channel, connected, serving

COUNT = 500


class SilentConnection:
    """A TCP connection on which the client sends nothing, or only some bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, address: str, local_address: str = "127.0.0.1") -> SilentConnection:
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port), local_addr=(local_address, 0)))

    async def wait_closed(self) -> None:
        """Wait until the server has closed the connection."""
        try:
            while await self._reader.read(1 << 16):
                pass
        except ConnectionError:
            pass

    def close(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def silent_connections(
    address: str, count: int, local_address: str = "127.0.0.1"
) -> AsyncGenerator[list[SilentConnection]]:
    opened = [await SilentConnection.open(address, local_address) for _ in range(count)]
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()


@pytest.fixture
def _short_handshakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.server.HANDSHAKE_TIMEOUT_S", 1.0)


@pytest.mark.usefixtures("_short_handshakes")
@pytest.mark.parametrize("data", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n"])
async def test_connections_without_a_handshake_are_closed(database_url: str, data: bytes) -> None:
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        async with (
            silent_connections(server.address, COUNT) as connections,
            asyncio.timeout(60),
        ):
            for connection in connections:
                connection.writer.write(data)
            await asyncio.gather(*(connection.wait_closed() for connection in connections))
        await chat.start()


@pytest.mark.usefixtures("_short_handshakes")
@pytest.mark.parametrize("has_tls", [False, True])
async def test_connections_to_a_tls_port_without_a_handshake_are_closed(
    database_url: str, tmp_path: Path, has_tls: bool
) -> None:
    """Without TLS the client sends nothing; with TLS it sends nothing of HTTP/2."""
    authority = CertificateAuthority()
    context = ssl.create_default_context(cadata=authority.pem.decode()) if has_tls else None
    if context is not None:
        context.set_alpn_protocols(["h2"])
    name = {"server_hostname": "localhost"} if has_tls else {}
    async with (
        serving(database_url, **write_tls_files(tmp_path, authority.issue())) as server,
        asyncio.timeout(60),
    ):
        host, _, port = server.address.rpartition(":")
        connections = [
            SilentConnection(
                *await asyncio.open_connection(host, int(port), ssl=context, **name)  # type: ignore[arg-type]
            )
            for _ in range(20)
        ]
        await asyncio.gather(*(connection.wait_closed() for connection in connections))
        for connection in connections:
            connection.close()


async def test_idle_connection_is_closed_and_its_client_connects_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.server.IDLE_TIMEOUT_S", 1.0)
    async with (
        serving(database_url) as server,
        channel(server.address) as idle,
        connected(server.address) as watching,
        asyncio.timeout(60),
    ):
        chat = await Chat.of_new_user(ChatHistoryServiceStub(idle))
        session_id = await chat.start()
        watch = Chat(watching, chat.user_id).watch(session_id)
        assert (await watch.read()).message.seq == 1
        async with RawConnection(server.address) as raw:
            await raw.closed.wait()
        while (state := idle.get_state()) is not grpc.ChannelConnectivity.IDLE:
            await idle.wait_for_state_change(state)
        await chat.append(session_id, "after the connection was closed")
        assert (await watch.read()).message.seq == 2, "a stream keeps its connection open"
        watch.cancel()


async def test_connections_above_the_limit_are_closed(database_url: str) -> None:
    async with (
        serving(database_url, max_connections=20) as server,
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        async with silent_connections(server.address, 19), asyncio.timeout(60):
            excess = await SilentConnection.open(server.address)
            await excess.wait_closed()
            excess.close()
            await chat.start()
        await _is_served(server)


async def test_connections_of_one_address_above_its_limit_are_closed(
    server: Server, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connections that receive data stay: that of the user, and one that is as old."""
    await server.connection_limit.stop()
    server.connection_limit.per_address = 5
    server.connection_limit._interval_s = 0.1
    with capture_logs() as events:
        async with (
            silent_connections(server.address, 5, "127.0.0.2") as of_other_address,
            silent_connections(server.address, 12, "127.0.0.1") as connections,
            asyncio.timeout(60),
        ):
            await asyncio.sleep(0.1)  # Data that is as old as the connections would not differ.
            await chat.start()
            server.connection_limit.start(server._servers[0][1])
            closings = [
                asyncio.create_task(connection.wait_closed())
                for connection in (*connections, *of_other_address)
            ]
            while not events or sum(map(asyncio.Task.done, closings)) < events[0]["connections"]:
                await asyncio.sleep(0.01)
            await chat.start()
            done = [closing.done() for closing in closings]
            assert (sum(done[:12]), sum(done[12:])) == (events[0]["connections"], 0)
            for closing in closings:
                closing.cancel()
            await asyncio.wait(closings)
    [event] = events
    assert (event["address"], event["limit"]) == ("127.0.0.1", 5)
    assert event["connections"] >= 8


async def _is_served(server: Server) -> None:
    """Assert that a new connection is accepted, once the closed ones are released."""
    async with asyncio.timeout(60), AsyncExitStack() as stack:
        while True:
            opened = await stack.enter_async_context(channel(server.address))
            health: Any = health_pb2_grpc.HealthStub(opened)
            try:
                await health.Check(health_pb2.HealthCheckRequest(service="liveness"))
            except grpc.aio.AioRpcError:
                continue
            return


async def test_looking_for_connections_takes_one_descriptor_at_a_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a check would exhaust the descriptors that a process with many connections has."""
    port = int(server.address.rpartition(":")[2])
    duplicates: list[int] = []
    dup = os.dup

    def record(descriptor: int) -> int:
        duplicates.append(dup(descriptor))
        return duplicates[-1]

    async with silent_connections(server.address, 20) as opened, asyncio.timeout(20):
        closed = 0
        while closed < 5:  # Until the server has accepted all of them.
            closed += sum(connections.close_excess(port, 15).values())
            await asyncio.sleep(0.01)
        monkeypatch.setattr(os, "dup", record)
        assert connections.close_excess(port, 15) == {}
        connections.close_connections(port)
        for connection in opened:
            await connection.wait_closed()
    assert len(duplicates) > 30
    assert len(set(duplicates)) < 10, "the number of a closed descriptor is used again"
