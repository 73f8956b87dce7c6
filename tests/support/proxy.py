"""A proxy on the loopback interface that can break connections to PostgreSQL or to the service.

It can reset all connections (`reset_connections`), reset new ones too (`refuse_connections`), block
data without closing anything, as a black hole does (`block`), and delay data (`delay`). A `tap`
sees every piece of data, and can reset its connection at exactly that point.
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
    """The direction of a piece of data."""

    TO_SERVER = auto()
    TO_CLIENT = auto()


class Link:
    """One connection through the proxy: the client's half, and the server's once it is open."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.halves = [client]
        self.passed = {Direction.TO_SERVER: 0, Direction.TO_CLIENT: 0}
        """Bytes received, by direction."""

    def reset(self) -> None:
        """Reset both halves."""
        for half in self.halves:
            reset_writer(half)

    def reset_client(self) -> None:
        """Reset the client's half only; the server's half stays open and receives nothing."""
        reset_writer(self.halves[0])


Tap = Callable[[Link, Direction, bytes], bool]
"""Called with each piece of data before it is passed on; False discards the piece."""


class Proxy:
    """A TCP proxy on a free port of 127.0.0.1, as an async context manager."""

    def __init__(self, upstream: str) -> None:
        """Take the server's address: the path of a Unix socket, or `host:port`."""
        self.upstream = upstream
        self.tap: Tap = _pass
        self.delay = 0.0
        """Seconds by which each piece of data is delayed."""
        self.links: set[Link] = set()
        self.accepted = 0
        """The number of connections that clients have opened."""
        self._is_refusing = False
        self._gates = {direction: asyncio.Event() for direction in Direction}
        self._pumps: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """The address on which it listens."""
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
        """Reset every connection; new ones are still accepted."""
        for link in list(self.links):
            link.reset()

    def reset_clients(self) -> None:
        """Reset the clients' halves and leave the server's open, as when a client's host fails."""
        for link in list(self.links):
            link.reset_client()

    def refuse_connections(self) -> None:
        """Reset every connection, and new ones too until `accept_connections` is called."""
        self._is_refusing = True
        self.reset_connections()

    def accept_connections(self) -> None:
        """Accept new connections again."""
        self._is_refusing = False

    def block(self, *directions: Direction) -> None:
        """Stop passing data on, in these directions or in both, without closing anything."""
        for direction in directions or Direction:
            self._gates[direction].clear()

    def unblock(self) -> None:
        """Pass on the blocked data and all later data."""
        for gate in self._gates.values():
            gate.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._is_refusing:
            reset_writer(writer)
            return
        link = Link(writer)
        self.links.add(link)
        # The task that the asyncio server runs for this connection. It ends with its pumps, or when
        # `__aexit__` cancels it.
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
        self,
        link: Link,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        while piece := await reader.read(_PIECE):
            await self._gates[direction].wait()
            if self.delay:
                await asyncio.sleep(self.delay)
            link.passed[direction] += len(piece)
            if not self.tap(link, direction, piece):
                continue
            writer.write(piece)
            await writer.drain()
        await self._gates[direction].wait()
        writer.close()


def reset_writer(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the peer receives a reset instead of an orderly end."""
    if writer.transport.is_closing():
        return
    peer = writer.get_extra_info("socket")
    if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def _pass(_link: Link, _direction: Direction, _piece: bytes) -> bool:
    return True


@asynccontextmanager
async def postgres_proxy(database_url: str) -> AsyncGenerator[tuple[Proxy, str]]:
    """Run a proxy to a test's database; provide it and the connection string through it."""
    url = make_url(routed_url(database_url))
    upstream = f"{url.host}:{url.port}" if url.host else f"{url.query['host']}/.s.PGSQL.5432"
    async with Proxy(upstream) as proxy:
        proxied = url.set(host="127.0.0.1", port=proxy.port).difference_update_query(["host"])
        proxied = proxied.update_query_dict({"sslmode": "disable"})
        yield proxy, proxied.render_as_string(hide_password=False)
