"""The serving process's side of the search process: starts and restarts it, and sends requests."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog

from service.search.types import (
    Changes,
    IndexFull,
    InputRejected,
    Point,
    PointFilter,
    ScoredPoint,
    SearchUnavailable,
    TextBlocked,
    VectorQuery,
)
from service.search.worker import framing, heartbeat, restarts
from service.search.worker.heartbeat import Heartbeat
from service.search.worker.suspects import Suspects
from service.search.worker.turns import Turns
from service.store.history_mark import Mark

REPLY_TIMEOUT_S = 60.0
"""After this time without a reply the process counts as stuck and is killed."""
_EXIT_TIMEOUT_S = 3.0
_SHUTTING_DOWN = "search is shutting down"
_BLOCKED = "the text ended the search process twice"
# One thread for each library: the search process shares its cores with the database and with chat.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)

_log = structlog.get_logger(__name__)


class ProcessDied(SearchUnavailable):
    """The search process died, or was killed because it was stuck, before it replied."""


@dataclass(frozen=True, slots=True)
class _Request:
    operation: str
    argument: Any
    blob: bytes

    @property
    def suspect(self) -> Any:
        """The text that may be the cause if the process dies; None if there is none or several."""
        match self.operation, self.argument:
            case "embed", [text]:
                return text
            case "rerank", _:
                return self.argument
            case _:
                return None


class _Connection:
    """One running search process and its socket."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        beats: socket.socket,
        on_unresponsive: Callable[[], None],
    ) -> None:
        self.process = process
        self.writer = writer
        self.replies: dict[int, asyncio.Future[framing.Frame]] = {}
        """Outstanding replies by request number."""
        self.has_index = False
        """Whether the process has opened the embedded index."""
        self.started_at = asyncio.get_running_loop().time()
        self._is_killed = False
        self._on_unresponsive = on_unresponsive
        self._heartbeat = Heartbeat(beats, self._on_missed_beats)
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
        except ValueError:
            # The frame is too large or malformed, so that the next one cannot be found.
            self.kill()
        finally:
            self._fail_outstanding()

    def _fail_outstanding(self) -> None:
        for reply in self.replies.values():
            if not reply.done():
                reply.set_exception(ProcessDied("the search process has died"))
        self.replies.clear()

    def _on_missed_beats(self, count: int) -> None:
        if self._is_killed:
            return
        if count == heartbeat.SUSPECT_AFTER:
            self._on_unresponsive()
        elif count == heartbeat.DEAD_AFTER:
            _log.warning("the search process is stuck and is ended", operation="heartbeat")
            self.kill()

    @property
    def is_alive(self) -> bool:
        return not self._is_killed and not self._receiver.done() and self.process.poll() is None

    def kill(self) -> None:
        """Kill the process, which no longer counts as alive, although it exits a little later."""
        self._is_killed = True
        self.process.kill()

    async def close(self) -> None:
        """Close the socket, which ends the process; kill it after _EXIT_TIMEOUT_S."""
        await self._heartbeat.close()
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

    The process computes one request at a time and gets the next one when it has replied. So a
    request that is cancelled while it waits is never computed, and a death has one possible cause.
    """

    def __init__(self) -> None:
        self.index_options: dict[str, Any] | None = None
        """Options of the embedded index, if any; set them before the first request to it."""
        self.restart_count = 0
        """Times that the process was started again since the start of the service."""
        self.on_unresponsive: Callable[[], None] = lambda: None
        """Called when the process stops responding. If it does not respond again soon, it is ended,
        and the next request starts it again."""
        self._connection: _Connection | None = None
        self._start_lock = asyncio.Lock()
        self._numbers = itertools.count()
        self._turns = Turns()
        self._suspects = Suspects()
        self._quick_death_count = 0
        self._exchange: asyncio.Task[tuple[Any, bytes]] | None = None
        self._closed = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The process id, while the process runs."""
        connection = self._connection
        return connection.process.pid if connection is not None and connection.is_alive else None

    async def call(
        self, operation: str, argument: Any = None, blob: bytes = b"", *, is_query: bool = False
    ) -> tuple[Any, bytes]:
        """Run an operation in the search process and return its result.

        If the process dies before its reply, the operation is repeated once in a new process.

        Args:
            operation: Name of the operation.
            argument: Its argument, which JSON can encode.
            blob: Bytes that the operation takes in addition.
            is_query: Whether a caller waits for the result. Queries precede indexing.

        Raises:
            SearchUnavailable: the process dies again or does not reply, or the operation raised it.
            TextBlocked: the process died twice while it computed this text.
            InputRejected: the operation raised it, or the process died with a batch of texts.
            SearchMisconfigured: the operation raised it.
        """
        request = _Request(operation, argument, blob)
        self._reject_blocked(request)
        try:
            return await self._take_turn(request, is_query=is_query)
        except ProcessDied:
            # Behind the queries that wait, since this request may be the cause.
            return await self._take_turn(request, is_query=False)

    async def _take_turn(self, request: _Request, *, is_query: bool) -> tuple[Any, bytes]:
        await self._turns.acquire(is_query=is_query)
        # A task of its own: a request that the process is computing keeps the turn until the reply,
        # also when its caller has gone.
        exchange = self._exchange = asyncio.get_running_loop().create_task(self._attempt(request))
        exchange.add_done_callback(self._end_turn)
        return await asyncio.shield(exchange)

    def _end_turn(self, exchange: asyncio.Task[tuple[Any, bytes]]) -> None:
        self._turns.release()
        if not exchange.cancelled():
            exchange.exception()  # Otherwise asyncio logs the error of an abandoned request.

    def _reject_blocked(self, request: _Request) -> None:
        texts = request.argument if request.operation == "embed" else [request.suspect]
        if any(self._suspects.is_blocked(text) for text in texts if text is not None):
            raise TextBlocked(_BLOCKED)

    async def _attempt(self, request: _Request) -> tuple[Any, bytes]:
        connection = await self._connect()
        if request.operation not in framing.EMBEDDING_OPERATIONS and not connection.has_index:
            await self._set_up_index(connection)
        suspect = request.suspect
        try:
            reply = await self._request(
                connection, request.operation, request.argument, request.blob
            )
        except ProcessDied:
            if suspect is not None:
                self._suspects.record_death(suspect)
                if self._suspects.is_blocked(suspect):
                    _log.warning(
                        "text blocked after it ended the search process twice",
                        operation=request.operation,
                    )
                    raise TextBlocked(_BLOCKED) from None
            elif request.operation == "embed":
                # The caller halves the batch until the text at fault is alone.
                raise InputRejected("a text of the batch ends the search process") from None
            raise
        if suspect is not None:
            self._suspects.clear(suspect)
        return reply

    async def _set_up_index(self, connection: _Connection) -> None:
        try:
            moved_to, _ = await self._request(connection, "setup", self.index_options)
        except ProcessDied as error:
            # The index is the cause, and not the request that needed it.
            raise SearchUnavailable(str(error)) from None
        if moved_to is not None:
            _log.warning(
                "the embedded index is damaged and is rebuilt from the database",
                moved_to=moved_to,
            )
        connection.has_index = True

    async def _request(
        self, connection: _Connection, operation: str, argument: Any, blob: bytes = b""
    ) -> tuple[Any, bytes]:
        number = next(self._numbers)
        frame = framing.encode([number, operation, argument], blob)
        reply = connection.replies[number] = asyncio.get_running_loop().create_future()
        try:
            connection.writer.write(frame)
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                await connection.writer.drain()
                _, error, result = (answer := await reply).header
        except TimeoutError:
            _log.warning("the search process is stuck and is ended", operation=operation)
            connection.kill()
            raise ProcessDied("the search process does not respond") from None
        except ConnectionError:
            raise ProcessDied("the search process has died") from None
        finally:
            connection.replies.pop(number, None)
        if error is not None:
            raise framing.ERRORS.get(error, SearchUnavailable)(result)
        return result, answer.blob

    async def _connect(self) -> _Connection:
        """Return the connection to the running process; start a process if none runs."""
        connection = self._connection
        if connection is not None and connection.is_alive:
            return connection
        async with self._start_lock:
            connection = self._connection
            if connection is not None and connection.is_alive:
                return connection
            if self._closed.is_set():
                raise SearchUnavailable(_SHUTTING_DOWN)
            if connection is not None:
                await self._bury(connection)
                if self._closed.is_set():
                    raise SearchUnavailable(_SHUTTING_DOWN)
            connection = self._connection = await self._start()
            return connection

    async def _bury(self, connection: _Connection) -> None:
        """Clean up after a process that has died, and wait until the next one may start."""
        self._connection = None
        await connection.close()
        uptime_s = asyncio.get_running_loop().time() - connection.started_at
        is_quick = uptime_s < restarts.STABLE_AFTER_S
        self._quick_death_count = self._quick_death_count + 1 if is_quick else 1
        self.restart_count += 1
        delay_s = restarts.delay_s(self._quick_death_count)
        _log.warning(
            "the search process has ended and is started again",
            code=connection.process.returncode,
            delay_s=delay_s,
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._closed.wait()

    async def _start(self) -> _Connection:
        own_end, child_end = socket.socketpair()
        own_beats, child_beats = socket.socketpair()
        with child_end, child_beats:
            ends = [child_end.fileno(), child_beats.fileno()]
            # A new interpreter instead of a fork, which would copy this process's threads, locks
            # and sockets.
            process = subprocess.Popen(  # noqa: ASYNC220, S603 - returns quickly; no external input
                [sys.executable, "-m", "service.search.worker.child", *map(str, ends)],
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | _ONE_THREAD,
            )
        own_end.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=own_end)
        return _Connection(process, reader, writer, own_beats, self._report_unresponsive)

    def _report_unresponsive(self) -> None:
        self.on_unresponsive()

    async def close(self) -> None:
        """End the process after the request that it has received."""
        self._closed.set()
        async with self._start_lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.close()


class SearchProcessIndex:
    """A `VectorIndex` in the search process."""

    def __init__(self, process: SearchProcess, max_points: int) -> None:
        self._process = process
        self.max_points: int | None = max_points
        self.is_full = False

    async def open(self) -> bool:
        return bool((await self._process.call("open"))[0])

    async def create_collection(self, mark: Mark | None = None) -> str:
        return str((await self._process.call("create_collection", mark))[0])

    async def live_collection(self) -> str | None:
        name: str | None = (await self._process.call("live_collection"))[0]
        return name

    async def has_collection(self, collection: str) -> bool:
        return bool((await self._process.call("has_collection", collection))[0])

    async def read_mark(self, collection: str | None = None) -> Mark | None:
        fields: list[Any] | None = (await self._process.call("read_mark", collection))[0]
        return None if fields is None else Mark(*fields)

    async def publish(self, collection: str) -> None:
        await self._process.call("publish", collection)

    async def write(self, changes: Changes, building: str | None) -> None:
        argument: dict[str, Sequence[Any] | str | None] = {
            "delete_filters": changes.delete_filters,
            "deletes": changes.deletes,
            "upserts": changes.upserts,
            "building": building,
            "mark": changes.mark,
        }
        (refused, self.is_full), _ = await self._process.call("write", argument, changes.vectors)
        if refused:
            raise IndexFull([changes.upserts[n] for n in refused])

    async def search(self, vector: bytes, query: VectorQuery) -> list[ScoredPoint]:
        hits, _ = await self._process.call("search", query, vector, is_query=True)
        return [ScoredPoint(Point(*fields), score) for fields, score in hits]

    async def count(self, point_filter: PointFilter) -> int:
        return int((await self._process.call("count", point_filter))[0])

    async def close(self) -> None:
        await self._process.close()
