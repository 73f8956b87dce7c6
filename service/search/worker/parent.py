"""The serving process's side of the search process: starts and restarts it, and sends requests."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import structlog

from service.search.types import (
    Changes,
    Point,
    PointFilter,
    ScoredPoint,
    SearchUnavailable,
    VectorQuery,
)
from service.search.worker import framing

REPLY_TIMEOUT_S = 60.0
"""After this time without a reply the process counts as stuck and is killed."""
_EXIT_TIMEOUT_S = 3.0
# One thread for each library: the search process shares its cores with the database and with chat.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)

_log = structlog.get_logger(__name__)


class _Connection:
    """One running search process and its socket."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.process = process
        self.writer = writer
        self.replies: dict[int, asyncio.Future[framing.Frame]] = {}
        """Outstanding replies by request number."""
        self.has_index = False
        """Whether the process has opened the embedded index."""
        self._reader = reader
        self._receiver = asyncio.get_running_loop().create_task(self._receive())

    async def _receive(self) -> None:
        try:
            while True:
                header_bytes, blob_bytes = framing.decode_lengths(
                    await self._reader.readexactly(framing.PREFIX_BYTES)
                )
                frame = framing.decode(
                    await self._reader.readexactly(header_bytes),
                    await self._reader.readexactly(blob_bytes),
                )
                reply = self.replies.pop(frame.header[0], None)
                if reply is not None and not reply.done():
                    reply.set_result(frame)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._fail_outstanding()

    def _fail_outstanding(self) -> None:
        for reply in self.replies.values():
            if not reply.done():
                reply.set_exception(SearchUnavailable("the search process has died"))
        self.replies.clear()

    @property
    def is_alive(self) -> bool:
        return not self._receiver.done() and self.process.poll() is None

    async def close(self) -> None:
        """Close the socket, which ends the process; kill it after _EXIT_TIMEOUT_S."""
        self.writer.close()
        self._receiver.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await self._receiver
        with suppress(ConnectionError):
            await self.writer.wait_closed()
        try:
            await asyncio.to_thread(self.process.wait, _EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)


class SearchProcess:
    """Runs the search process on demand, and starts it again if it dies.

    The process handles its requests one at a time, in order.
    """

    def __init__(self) -> None:
        self.index_options: dict[str, Any] | None = None
        """Options of the embedded index, if any; set them before the first request to it."""
        self._connection: _Connection | None = None
        self._start_lock = asyncio.Lock()
        self._numbers = itertools.count()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process id, while the process runs."""
        connection = self._connection
        return connection.process.pid if connection is not None and connection.is_alive else None

    async def call(
        self, operation: str, argument: Any = None, blob: bytes = b""
    ) -> tuple[Any, bytes]:
        """Run an operation in the search process and return its result.

        Raises:
            SearchUnavailable: the process died or does not reply, or the operation raised it.
            InputRejected, SearchMisconfigured: the operation raised it.
        """
        connection = await self._connect()
        if operation not in framing.EMBEDDING_OPERATIONS and not connection.has_index:
            moved_to, _ = await self._request(connection, "setup", self.index_options)
            if moved_to is not None:
                _log.warning(
                    "the embedded index is damaged and is rebuilt from the database",
                    moved_to=moved_to,
                )
            connection.has_index = True
        return await self._request(connection, operation, argument, blob)

    async def _request(
        self, connection: _Connection, operation: str, argument: Any, blob: bytes = b""
    ) -> tuple[Any, bytes]:
        number = next(self._numbers)
        reply = connection.replies[number] = asyncio.get_running_loop().create_future()
        try:
            connection.writer.write(framing.encode([number, operation, argument], blob))
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                await connection.writer.drain()
                frame = await reply
        except TimeoutError:
            _log.warning("the search process is stuck and is ended", operation=operation)
            connection.process.kill()
            raise SearchUnavailable("the search process does not respond") from None
        except ConnectionError:
            raise SearchUnavailable("the search process has died") from None
        finally:
            connection.replies.pop(number, None)
        _, error, result = frame.header
        if error is not None:
            raise framing.ERRORS.get(error, SearchUnavailable)(result)
        return result, frame.blob

    async def _connect(self) -> _Connection:
        """Return the connection to the running process; start a process if none runs."""
        connection = self._connection
        if connection is not None and connection.is_alive:
            return connection
        async with self._start_lock:
            connection = self._connection
            if connection is not None and connection.is_alive:
                return connection
            if self._closed:
                raise SearchUnavailable("search is shutting down")
            if connection is not None:
                self._connection = None
                await connection.close()
                _log.warning(
                    "the search process has ended and is started again",
                    code=connection.process.returncode,
                )
            connection = self._connection = await self._start()
            return connection

    @staticmethod
    async def _start() -> _Connection:
        own_end, child_end = socket.socketpair()
        with child_end:
            # A new interpreter instead of a fork, which would copy this process's threads, locks
            # and sockets.
            process = subprocess.Popen(  # noqa: ASYNC220, S603 - returns quickly; no external input
                [sys.executable, "-m", "service.search.worker.child", str(child_end.fileno())],
                pass_fds=[child_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | _ONE_THREAD,
            )
        own_end.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=own_end)
        return _Connection(process, reader, writer)

    async def close(self) -> None:
        """End the process after the requests that it has received."""
        self._closed = True
        async with self._start_lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.close()


class SearchProcessIndex:
    """A `VectorIndex` in the search process."""

    def __init__(self, process: SearchProcess) -> None:
        self._process = process

    async def open(self) -> bool:
        return bool((await self._process.call("open"))[0])

    async def create_collection(self) -> str:
        return str((await self._process.call("create_collection"))[0])

    async def live_collection(self) -> str | None:
        name: str | None = (await self._process.call("live_collection"))[0]
        return name

    async def publish(self, collection: str) -> None:
        await self._process.call("publish", collection)

    async def write(self, changes: Changes, building: str | None) -> None:
        argument: dict[str, Sequence[Any] | str | None] = {
            "delete_filters": changes.delete_filters,
            "deletes": changes.deletes,
            "upserts": changes.upserts,
            "building": building,
        }
        await self._process.call("write", argument, changes.vectors)

    async def search(self, vector: bytes, query: VectorQuery) -> list[ScoredPoint]:
        hits, _ = await self._process.call("search", query, vector)
        return [ScoredPoint(Point(*fields), score) for fields, score in hits]

    async def count(self, point_filter: PointFilter) -> int:
        return int((await self._process.call("count", point_filter))[0])

    async def close(self) -> None:
        await self._process.close()
