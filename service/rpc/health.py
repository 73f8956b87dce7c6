"""The standard health service: liveness, readiness, the database and search, each by name.

`Check` of readiness answers from memory, so that probes never wake a suspended database.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc.readiness import Half, Readiness
from service.search.disabled import AnySearch
from service.store.db.database import Database
from service.store.db.db_errors import DATABASE_ERRORS

SERVICE = "chathistory.v1.ChatHistoryService"
DATABASE_CHECK_TIMEOUT_S = 5.0
"""Timeout of a check of the name `database`: a suspended database needs time to start."""
DATABASE_CHECK_TTL_S = 1.0
"""Time for which the result of one check of the database answers later checks."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


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
            "reads": lambda: readiness.is_up(Half.READS),
            "writes": lambda: readiness.is_up(Half.WRITES),
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
        """Return a name's status: `database` by a probe, all others from memory."""
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
            return _SERVING if await self._database_works() else _NOT_SERVING
        is_serving = self._is_serving_by_name.get(name)
        if is_serving is None:
            return _UNKNOWN
        return _SERVING if is_serving() else _NOT_SERVING

    async def _database_works(self) -> bool:
        """Return whether the database reads and writes; checks within a second share a probe."""
        loop = asyncio.get_running_loop()
        check = self._database_check
        if check is None or (
            check.done() and loop.time() - self._database_checked_at > DATABASE_CHECK_TTL_S
        ):
            self._database_checked_at = loop.time()
            self._database_check = check = loop.create_task(self._probe_database())
        return await asyncio.shield(check)

    async def _probe_database(self) -> bool:
        try:
            problems = await self._database.prober.probe(DATABASE_CHECK_TIMEOUT_S)
        except DATABASE_ERRORS:
            self._readiness.request_probe()
            return False
        if problems.is_failing:
            self._readiness.request_probe()
        # Whether the schema fits is not asked: a database without one answers.
        return not (problems.reads or problems.writes)
