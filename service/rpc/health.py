"""The standard health service, and the readiness that it reports.

`Check` of readiness answers from memory, so that probes never wake a suspended database: the traffic's own failures cast doubt, and
only then the database is asked, every second until it answers again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import structlog
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.store.db.database import DATABASE_ERRORS, Database

SERVICE = "chathistory.v1.ChatHistoryService"
PROBE_SECONDS = 1.0
"""Between two questions to a database that does not answer."""
PROBE_TIMEOUT = 2.0
"""How long the database has to answer one, in seconds."""
ASKED_TIMEOUT = 5.0
"""The same for a person's question: a suspended database may need a moment."""
SHARED_SECONDS = 1.0
"""How long the answer to a person's question serves others."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

_log = structlog.get_logger(__name__)


class Readiness:
    """Whether calls can be served, by the latest evidence. Not ready until the database has answered and its schema fits."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.ready = False
        self.problem = "not asked yet"
        """Why it is not ready, in words for the log."""
        self._draining = False
        self._doubted = False
        self.prober: asyncio.Task[None] | None = None
        """Asks the database, while there is doubt."""
        self._listeners: set[asyncio.Event] = set()
        self._first = asyncio.Event()

    def request_probe(self) -> None:
        """Ask the database, since a call has shown that it may not answer."""
        self._doubted = True
        if self.prober is None and not self._draining:
            self.prober = asyncio.get_running_loop().create_task(self._probe())

    async def wait_ready(self) -> None:
        """Wait for the first time that it is ready."""
        await self._first.wait()

    def drain(self) -> None:
        """Turn NOT_SERVING for good."""
        self._draining = True
        if self.prober is not None:
            self.prober.cancel()
        self._set(ready=False, problem="shutting down")

    def tell(self) -> None:
        """Have those who listen look again: something else that health reports has changed."""
        for event in self._listeners:
            event.set()

    def listen(self) -> asyncio.Event:
        """Return an event that is set at every change; give it back to `unlisten`."""
        event = asyncio.Event()
        self._listeners.add(event)
        return event

    def unlisten(self, event: asyncio.Event) -> None:
        """Stop setting an event."""
        self._listeners.discard(event)

    async def _probe(self) -> None:
        try:
            while self._doubted or not self.ready:
                self._doubted = False
                problem = await self._ask()
                self._set(ready=problem is None, problem=problem or "")
                if problem is not None:
                    await asyncio.sleep(PROBE_SECONDS)
        finally:
            self.prober = None

    async def _ask(self) -> str | None:
        try:
            return (await self._database.probe(PROBE_TIMEOUT)).problem
        except TimeoutError:
            # Gone without a word: what waits on its connections would wait for their own time-outs.
            self._database.hot_pool.terminate()
            return "the database does not answer in time"
        except DATABASE_ERRORS as error:
            return f"the database does not answer ({type(error).__name__})"
        except Exception as error:  # noqa: BLE001 - whatever stands in there: ask again, or it would never be ready
            return f"the schema cannot be read ({type(error).__name__})"

    def _set(self, *, ready: bool, problem: str) -> None:
        if (ready, problem) == (self.ready, self.problem):
            return
        if ready:
            _log.info("ready")
            self._first.set()
        else:
            _log.warning("not ready", problem=problem)
        changed = ready != self.ready
        self.ready, self.problem = ready, problem
        if changed:
            self.tell()


class Health(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1.Health`, with the names of the contract."""

    def __init__(
        self, database: Database, readiness: Readiness, search: Callable[[], bool] | None = None
    ) -> None:
        """Take what is reported; without `search` that name is not known."""
        self._database = database
        self._readiness = readiness
        self._asked: asyncio.Task[bool] | None = None
        self._asked_at = 0.0
        self._closing = False
        self._names: dict[str, Callable[[], bool]] = {
            "": lambda: readiness.ready,
            SERVICE: lambda: readiness.ready,
            "liveness": lambda: True,
        }
        if search is not None:
            self._names["search"] = search

    def close(self) -> None:
        """End every Watch, once it has told how things are: an open stream would eat the whole grace of a shutdown."""
        self._closing = True
        self._readiness.tell()

    async def finish(self) -> None:
        """End the questions that are under way, once nobody waits for their answers."""
        questions = [task for task in (self._asked, self._readiness.prober) if task is not None]
        for task in questions:
            task.cancel()
        await asyncio.gather(*questions, return_exceptions=True)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Say how a name is now; `database` is asked now, the others answer from memory."""
        status = await self._status(request.service)
        if status == _UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such name")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse]:
        """Say how a name is now, and again whenever it changes."""
        event = self._readiness.listen()
        last: int | None = None
        try:
            while True:
                event.clear()
                status = await self._status(request.service)
                if status != last:
                    yield health_pb2.HealthCheckResponse(status=status)
                last = status
                if self._closing:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "this server is shutting down")
                await event.wait()
        finally:
            self._readiness.unlisten(event)

    async def _status(self, name: str) -> int:
        if name == "database":
            return _SERVING if await self._ask_now() else _NOT_SERVING
        known = self._names.get(name)
        if known is None:
            return _UNKNOWN
        return _SERVING if known() else _NOT_SERVING

    async def _ask_now(self) -> bool:
        """Ask the database; those who ask within a second share the answer."""
        now = asyncio.get_running_loop().time()
        if self._asked is None or (self._asked.done() and now - self._asked_at > SHARED_SECONDS):
            self._asked_at = now
            self._asked = asyncio.get_running_loop().create_task(self._round_trip())
        return await asyncio.shield(self._asked)

    async def _round_trip(self) -> bool:
        try:
            await self._database.probe(ASKED_TIMEOUT)
        except DATABASE_ERRORS:
            self._readiness.request_probe()
            return False
        return True
