"""The parent's side of the child process: it is started when it is needed, and again when it has died."""

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
    InputRejected,
    Point,
    PointFilter,
    ScoredPoint,
    SearchMisconfigured,
    SearchUnavailable,
    VectorQuery,
)
from service.search.worker import framing

TIMEOUT = 60.0
"""Seconds after which a child that does not answer is taken for stuck, and ended."""
_ENDING = 3.0
"""Seconds that the child gets to end."""
# One thread each: what computes in the child shares the machine with the database and with those who chat.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)
_KNOWN = {
    "SearchUnavailable": SearchUnavailable,
    "InputRejected": InputRejected,
    "SearchMisconfigured": SearchMisconfigured,
}

_log = structlog.get_logger(__name__)


class _Run:
    """One life of the child."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.process = process
        self.reader = reader
        self.writer = writer
        self.waiting: dict[int, asyncio.Future[framing.Frame]] = {}
        self.listening = asyncio.get_running_loop().create_task(self._listen())
        self.ready = False
        self.is_set_up = False

    async def _listen(self) -> None:
        try:
            while True:
                header_size, blob_size = framing.lengths(
                    await self.reader.readexactly(framing.HEAD_BYTES)
                )
                frame = framing.decode(
                    await self.reader.readexactly(header_size),
                    await self.reader.readexactly(blob_size),
                )
                answer = self.waiting.pop(frame.header[0], None)
                if answer is not None and not answer.done():
                    answer.set_result(frame)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.fail()

    def fail(self) -> None:
        """Tell those who wait that no answer will come."""
        for answer in self.waiting.values():
            if not answer.done():
                answer.set_exception(SearchUnavailable("the search process has died"))
        self.waiting.clear()

    @property
    def alive(self) -> bool:
        return not self.listening.done() and self.process.poll() is None

    async def end(self) -> None:
        """Close the socket, which ends the child; one that does not end is killed."""
        self.writer.close()
        self.listening.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await self.listening
        with suppress(ConnectionError):
            await self.writer.wait_closed()
        try:
            await asyncio.to_thread(self.process.wait, _ENDING)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)


class SearchProcess:
    """Runs the child process and passes requests to it, which it works off in order."""

    def __init__(self) -> None:
        self.setup: dict[str, Any] | None = None
        """What the embedded index is opened with, if the child is to have one; set it before the first request to it."""
        self._run: _Run | None = None
        self._starting = asyncio.Lock()
        self._numbers = itertools.count()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return self._run.process.pid if self._run is not None and self._run.alive else None

    async def call(self, operation: str, given: Any = None, blob: bytes = b"") -> tuple[Any, bytes]:
        """Have the child do something.

        Raises:
            SearchDown, Refused, WrongIndex: as the child says, or because it is gone.
        """
        run = await self._ready()
        if operation not in framing.OF_TEXTS and not run.is_set_up:
            aside, _ = await self._ask(run, "setup", self.setup)
            if aside is not None:
                _log.warning(
                    "the embedded index could not be read, and is built anew", moved_to=aside
                )
            run.is_set_up = True
        return await self._ask(run, operation, given, blob)

    async def _ask(
        self, run: _Run, operation: str, given: Any, blob: bytes = b""
    ) -> tuple[Any, bytes]:
        number = next(self._numbers)
        answer = run.waiting[number] = asyncio.get_running_loop().create_future()
        try:
            run.writer.write(framing.encode([number, operation, given], blob))
            async with asyncio.timeout(TIMEOUT):
                await run.writer.drain()
                frame = await answer
        except TimeoutError:
            _log.warning("the search process is stuck and is ended", operation=operation)
            run.process.kill()
            raise SearchUnavailable("the search process does not answer") from None
        except ConnectionError:
            raise SearchUnavailable("the search process has died") from None
        finally:
            run.waiting.pop(number, None)
        _, error, result = frame.header
        if error is not None:
            raise _KNOWN.get(error, SearchUnavailable)(result)
        return result, frame.blob

    async def _ready(self) -> _Run:
        run = self._run
        if run is not None and run.ready and run.alive:
            return run
        async with self._starting:
            run = self._run
            if run is not None and run.ready and run.alive:
                return run
            if self._closed:
                raise SearchUnavailable("search is shutting down")
            if run is not None:
                self._run = None
                await run.end()
                _log.warning(
                    "the search process has ended and is started again", code=run.process.returncode
                )
            run = self._run = await self._start()
            run.ready = True
            return run

    @staticmethod
    async def _start() -> _Run:
        ours, theirs = socket.socketpair()
        with theirs:
            # An interpreter of its own: nothing of this process's threads, locks and sockets goes with it, as a fork would take.
            process = subprocess.Popen(  # noqa: ASYNC220, S603 - returns at once; no input of anybody's
                [sys.executable, "-m", "service.search.worker.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | _ONE_THREAD,
            )
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        return _Run(process, reader, writer)

    async def close(self) -> None:
        """End the child, once what it was asked before is done."""
        self._closed = True
        async with self._starting:
            run, self._run = self._run, None
            if run is not None:
                await run.end()


class SearchProcessIndex:
    """An `Index` that runs in the child process."""

    def __init__(self, child: SearchProcess) -> None:
        self._process = child

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
        given: dict[str, Sequence[Any] | str | None] = {
            "wipes": changes.wipes, "deletes": changes.deletes, "points": changes.points, "building": building,
        }  # fmt: skip
        await self._process.call("write", given, changes.vectors)

    async def search(self, vector: bytes, question: VectorQuery) -> list[ScoredPoint]:
        answer, _ = await self._process.call("search", question, vector)
        return [ScoredPoint(Point(*point), score) for point, score in answer]

    async def count(self, wipe: PointFilter) -> int:
        return int((await self._process.call("count", wipe))[0])

    async def close(self) -> None:
        await self._process.close()
