"""A proxy on the loopback that breaks the connections that pass through it, before PostgreSQL or before the service.

What can be done, to all connections and to those that come: `cut` (resets), `refuse` (turns newcomers away too), `hold` (a black hole:
nothing passes, nothing is closed), `delay`, and a `tap` that sees every piece of data and can break its link at exactly that point.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from enum import Enum, auto
from typing import Self

from sqlalchemy import make_url

from tests.support.route import routed_url

_PIECE = 64 * 1024
_RESET = struct.pack("ii", 1, 0)


class Direction(Enum):
    """Where a piece of data goes."""

    TO_SERVER = auto()
    """To the server."""
    TO_CLIENT = auto()
    """To the client."""


class Link:
    """One connection through the proxy: the client's half, and the server's once it is there."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.halves = [client]
        self.passed = {Direction.TO_SERVER: 0, Direction.TO_CLIENT: 0}
        """Bytes seen, by where they go."""

    def reset(self) -> None:
        """Reset both halves."""
        for half in self.halves:
            reset_writer(half)

    def reset_client(self) -> None:
        """Reset the client's half only: the server is left with a half-open connection and is told nothing."""
        reset_writer(self.halves[0])


Tap = Callable[[Link, Direction, bytes], bool]
"""Sees a piece before it passes; False swallows it."""


class Proxy:
    """Listens on a free port of 127.0.0.1; an async context manager."""

    def __init__(self, upstream: str) -> None:
        """Name where connections go: the path of a Unix socket, or `host:port`."""
        self.upstream = upstream
        self.tap: Tap = _pass
        self.delay = 0.0
        """Seconds by which each piece comes later."""
        self.links: set[Link] = set()
        self.accepted = 0
        """How many connections have come."""
        self._refusing = False
        self._open = {way: asyncio.Event() for way in Direction}
        self._pumps: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self.unblock()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_PIECE)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.reset_connections()
        for pump in self._pumps:
            pump.cancel()
        while self._pumps:
            await asyncio.wait(self._pumps)
        await self._server.wait_closed()

    def reset_connections(self) -> None:
        """Reset every connection; new ones pass."""
        for link in list(self.links):
            link.reset()

    def reset_clients(self) -> None:
        """Reset the clients' halves and leave the server's open, as when a network or a machine has gone away."""
        for link in list(self.links):
            link.reset_client()

    def refuse_connections(self) -> None:
        """Reset every connection, new ones too, until `accept`."""
        self._refusing = True
        self.reset_connections()

    def accept_connections(self) -> None:
        """Take new connections again."""
        self._refusing = False

    def block(self, *ways: Direction) -> None:
        """Let nothing pass, in these directions or in both, and close nothing."""
        for way in ways or Direction:
            self._open[way].clear()

    def unblock(self) -> None:
        """Let pass what was held, and what comes."""
        for gate in self._open.values():
            gate.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._refusing:
            reset_writer(writer)
            return
        link = Link(writer)
        self.links.add(link)
        # The server's own task: it ends with its pumps, and `__aexit__` cancels it.
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        try:
            up_reader, up_writer = await self._connect()
            link.halves.append(up_writer)
            await asyncio.gather(
                self._pump(link, Direction.TO_SERVER, reader, up_writer),
                self._pump(link, Direction.TO_CLIENT, up_reader, writer),
            )
        except OSError:
            link.reset()
        except asyncio.CancelledError:
            link.reset()
        finally:
            self.links.discard(link)
            self._pumps.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.upstream.startswith("/"):
            return await asyncio.open_unix_connection(self.upstream, limit=_PIECE)
        host, _, port = self.upstream.rpartition(":")
        return await asyncio.open_connection(host, int(port), limit=_PIECE)

    async def _pump(
        self, link: Link, way: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while piece := await reader.read(_PIECE):
            await self._open[way].wait()
            if self.delay:
                await asyncio.sleep(self.delay)
            link.passed[way] += len(piece)
            if not self.tap(link, way, piece):
                continue
            writer.write(piece)
            await writer.drain()
        await self._open[way].wait()
        writer.close()


def reset_writer(writer: asyncio.StreamWriter) -> None:
    """Close a connection the hard way: the other side gets a reset instead of an end."""
    if writer.transport.is_closing():
        return
    peer = writer.get_extra_info("socket")
    if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def _pass(_link: Link, _way: Direction, _piece: bytes) -> bool:
    return True


@asynccontextmanager
async def postgres_proxy(database_url: str) -> AsyncGenerator[tuple[Proxy, str]]:
    """Put a proxy on a service's way to a test's database; give it and the connection string through it."""
    url = make_url(routed_url(database_url))
    upstream = f"{url.host}:{url.port}" if url.host else f"{url.query['host']}/.s.PGSQL.5432"
    async with Proxy(upstream) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.port).difference_update_query(["host"])
        yield (
            proxy,
            through.update_query_dict({"sslmode": "disable"}).render_as_string(hide_password=False),
        )
