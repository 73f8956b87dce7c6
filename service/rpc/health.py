"""The standard health service, and the readiness that it reports.

`Check` of readiness answers from memory, so that probes never wake a suspended database. The
database is probed only after a failed call suggests an outage, every second until it answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import structlog
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.search.disabled import AnySearch
from service.store.db.database import DATABASE_ERRORS, Database
from service.store.db.db_errors import describe

SERVICE = "chathistory.v1.ChatHistoryService"
PROBE_INTERVAL_S = 1.0
"""Pause between two probes of a database that does not answer."""
PROBE_TIMEOUT_S = 2.0
DATABASE_CHECK_TIMEOUT_S = 5.0
"""Timeout of a check of the name `database`: a suspended database needs time to start."""
DATABASE_CHECK_TTL_S = 1.0
"""Time for which the result of one check of the database answers later checks."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

_log = structlog.get_logger(__name__)


class Readiness:
    """Whether calls can be served, by the latest evidence.

    Calls count as not servable until the database has answered and its schema fits.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.is_ready = False
        self.problem = "the database has not been probed yet"
        """Why it is not ready, for the log."""
        self._is_draining = False
        self._probe_requested = False
        self.probe_task: asyncio.Task[None] | None = None
        """Probes the database until it answers; None while no failure suggests an outage."""
        self._subscriptions: set[asyncio.Event] = set()
        self._was_ready = asyncio.Event()

    def request_probe(self) -> None:
        """Probe the database, since a failed call suggests that it may not answer."""
        self._probe_requested = True
        if self.probe_task is None and not self._is_draining:
            self.probe_task = asyncio.get_running_loop().create_task(self._probe())

    async def wait_ready(self) -> None:
        """Wait until the service has been ready at least once."""
        await self._was_ready.wait()

    def drain(self) -> None:
        """Report NOT_SERVING until the process ends, and stop probing."""
        self._is_draining = True
        if self.probe_task is not None:
            self.probe_task.cancel()
        self._update(is_ready=False, problem="shutting down")

    def notify(self) -> None:
        """Wake the subscribers, because a status that health reports has changed."""
        for event in self._subscriptions:
            event.set()

    def subscribe(self) -> asyncio.Event:
        """Return an event that is set at every change; pass it to `unsubscribe` later."""
        event = asyncio.Event()
        self._subscriptions.add(event)
        return event

    def unsubscribe(self, event: asyncio.Event) -> None:
        """Stop setting an event."""
        self._subscriptions.discard(event)

    async def _probe(self) -> None:
        try:
            while self._probe_requested or not self.is_ready:
                self._probe_requested = False
                problem = await self._find_problem()
                self._update(is_ready=problem is None, problem=problem or "")
                if problem is not None:
                    await asyncio.sleep(PROBE_INTERVAL_S)
        finally:
            self.probe_task = None

    async def _find_problem(self) -> str | None:
        try:
            return (await self._database.probe(PROBE_TIMEOUT_S)).problem
        except TimeoutError:
            # The database vanished without closing its connections. Terminating them ends the calls
            # that wait on them, which would otherwise wait for their own timeouts.
            self._database.hot_pool.terminate()
            return "the database does not answer in time"
        except DATABASE_ERRORS as error:
            return describe(error)
        except Exception as error:  # noqa: BLE001 - if probing ended, the service would never be ready
            return f"the schema cannot be read ({type(error).__name__})"

    def _update(self, *, is_ready: bool, problem: str) -> None:
        if (is_ready, problem) == (self.is_ready, self.problem):
            return
        if is_ready:
            _log.info("ready")
            self._was_ready.set()
        else:
            _log.warning("not ready", problem=problem)
        has_changed = is_ready != self.is_ready
        self.is_ready, self.problem = is_ready, problem
        if has_changed:
            self.notify()


class Health(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1.Health`: liveness, readiness, the database and search, each by name."""

    def __init__(self, database: Database, readiness: Readiness, search: AnySearch) -> None:
        """Take the parts to report on; the name `search` exists only where search is enabled."""
        self._database = database
        self._readiness = readiness
        self._database_check: asyncio.Task[bool] | None = None
        self._database_checked_at = 0.0
        self._is_closing = False
        self._is_serving_by_name: dict[str, Callable[[], bool]] = {
            "": lambda: readiness.is_ready,
            SERVICE: lambda: readiness.is_ready,
            "liveness": lambda: True,
        }
        if search.is_enabled:
            self._is_serving_by_name["search"] = lambda: search.is_healthy

    def close(self) -> None:
        """End every Watch after a last status; otherwise shutdown would wait for these streams."""
        self._is_closing = True
        self._readiness.notify()

    async def cancel_probes(self) -> None:
        """Cancel the probes in flight. Call it when no caller waits for them any more."""
        probes = [
            task for task in (self._database_check, self._readiness.probe_task) if task is not None
        ]
        for task in probes:
            task.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Return a name's status: `database` by a round trip, all others from memory."""
        status = await self._status(request.service)
        if status == _UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, "health has no service of this name on this server"
            )
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse]:
        """Send a name's status, and again after every change."""
        event = self._readiness.subscribe()
        last_status: int | None = None
        try:
            while True:
                event.clear()
                status = await self._status(request.service)
                if status != last_status:
                    yield health_pb2.HealthCheckResponse(status=status)
                last_status = status
                if self._is_closing:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "this server is shutting down")
                await event.wait()
        finally:
            self._readiness.unsubscribe(event)

    async def _status(self, name: str) -> int:
        if name == "database":
            return _SERVING if await self._database_answers() else _NOT_SERVING
        is_serving = self._is_serving_by_name.get(name)
        if is_serving is None:
            return _UNKNOWN
        return _SERVING if is_serving() else _NOT_SERVING

    async def _database_answers(self) -> bool:
        """Return whether the database answers; checks within a second share one round trip."""
        loop = asyncio.get_running_loop()
        check = self._database_check
        if check is None or (
            check.done() and loop.time() - self._database_checked_at > DATABASE_CHECK_TTL_S
        ):
            self._database_checked_at = loop.time()
            self._database_check = check = loop.create_task(self._round_trip())
        return await asyncio.shield(check)

    async def _round_trip(self) -> bool:
        try:
            await self._database.probe(DATABASE_CHECK_TIMEOUT_S)
        except DATABASE_ERRORS:
            self._readiness.request_probe()
            return False
        return True
