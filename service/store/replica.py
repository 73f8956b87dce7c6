"""Reads that may lag: from a replica while its data is fresh enough, and else from the primary.

No error is caused by the replica. Whatever it lacks, and whatever fails there, the primary is read.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from service.config import Settings
from service.errors import NotFound, Overloaded, ServiceError
from service.store.db.database import Database
from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.read_target import read_target
from service.store.db.recent_keys import RecentKeys
from service.store.db.work_class import WorkClass
from service.store.epoch import EpochKeeper
from service.store.lag_gate import LagGate, ReplicaBehind

T = TypeVar("T")

FIRST_ANSWER_S = 1.0
"""Seconds in which the replica must have shown the age of its data, with the wait for a
connection."""
RETRY_AFTER_S = 5.0
"""Seconds for which a replica that did not answer is not asked again."""
POOL_TIMEOUT_S = 0.5
"""Seconds that a read waits for a connection to the replica."""
PRIMARY_SHARE = 1 / 3
"""Share of a call's time that is left for the primary when a read of the replica fails."""
OUTCOMES = ("replica", "stale", "missing", "failed")
"""Where reads that may lag were served: by the replica, or by the primary, and why: the replica
might lack what the read must show, did not have the resource, or failed."""

_ERRORS = (ServiceError, *DATABASE_ERRORS)
_log = structlog.get_logger(__name__)


class NotReadFromReplica(Exception):
    """The replica cannot serve a read: the primary must."""


class LaggingDatabase:
    """A replica with the primary behind it. Implements `readers.Reader`."""

    def __init__(
        self, primary: Database, replica: Database, keeper: EpochKeeper, max_lag_s: float
    ) -> None:
        """Take the two databases.

        Args:
            primary: The primary.
            replica: A pool of connections to the replica.
            keeper: The epoch of the primary.
            max_lag_s: Age in seconds of the oldest data that the replica may return.
        """
        self.replica = replica
        self.gate = LagGate(keeper, max_lag_s)
        self.counts = dict.fromkeys(OUTCOMES, 0)
        """Reads by outcome since the start."""
        self._primary = primary
        self._loop = asyncio.get_running_loop()
        self._is_failing = False
        self._retry_at = -math.inf
        self._answered_at = -math.inf
        """When the replica has answered last, on the loop's clock."""
        self._running = 0
        """Reads that the replica has begun to answer."""

    @property
    def large_reads(self) -> RecentKeys:
        """Those of the primary, which has the same data."""
        return self._primary.large_reads

    async def read(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        *,
        owner_id: str,
        deadline: float,
        work_class: WorkClass = WorkClass.ORDINARY,
    ) -> T:
        """Run statements that change nothing; as `Database.read`, which it falls back to."""
        try:
            return await self.read_replica(
                work, owner_id=owner_id, deadline=deadline, work_class=work_class
            )
        except NotReadFromReplica:
            return await self._primary.read(
                work, owner_id=owner_id, deadline=deadline, work_class=work_class
            )

    async def read_replica(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        *,
        owner_id: str,
        deadline: float,
        work_class: WorkClass = WorkClass.ORDINARY,
    ) -> T:
        """Run statements on the replica, in a transaction that begins with the check of its age.

        Args:
            work: As for `Database.read`. May raise ReplicaBehind.
            owner_id: The user in whose turn the call waits.
            deadline: The call's deadline; less time is used.
            work_class: Whose permits of the replica the work uses.

        Raises:
            NotReadFromReplica: the primary must be read.
        """
        started_at = self._loop.time()
        outcome = "failed"
        try:
            if started_at >= self._retry_at:
                result = await self._read_checked(work, owner_id, deadline, work_class)
                self.counts["replica"] += 1
                return result
        except ReplicaBehind:
            outcome = "stale"
        except NotFound:
            outcome = "missing"  # It may have been created within the lag.
        except _ERRORS as error:
            is_busy = isinstance(error, Overloaded) or self._running > 0
            if not is_busy and self._answered_at < started_at:
                self._note_failure(error)
        self.counts[outcome] += 1
        raise NotReadFromReplica

    async def _read_checked(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        owner_id: str,
        deadline: float,
        work_class: WorkClass,
    ) -> T:
        now = self._loop.time()
        if self._is_failing:
            self._retry_at = now + RETRY_AFTER_S  # Of several calls one finds out.

        async def checked_work(connection: AsyncConnection) -> T:
            if self._is_failing:
                # The tables may have been moved.
                await self.replica.locator.locate(connection)
            try:
                await self.gate.check(connection)
            except ReplicaBehind:
                self._note_answer()
                raise
            self._note_answer()
            if not scope.expired():
                scope.reschedule(None)
            self._running += 1
            try:
                return await work(connection)
            finally:
                self._running -= 1

        async with asyncio.timeout(FIRST_ANSWER_S) as scope:
            return await self.replica.read(
                checked_work,
                owner_id=owner_id,
                deadline=deadline - (deadline - now) * PRIMARY_SHARE,
                work_class=work_class,
            )

    def _note_answer(self) -> None:
        self._answered_at = self._loop.time()
        if self._is_failing:
            self._is_failing = False
            self._retry_at = -math.inf
            _log.info("replica is read again")

    def _note_failure(self, error: BaseException) -> None:
        self._retry_at = self._loop.time() + RETRY_AFTER_S
        if not self._is_failing:
            self._is_failing = True
            _log.warning("replica not read", error=type(error).__name__)

    async def close(self) -> None:
        """Close the connections to the replica."""
        await self.replica.close()


def create_lagging_database(
    settings: Settings, primary: Database, keeper: EpochKeeper
) -> LaggingDatabase | None:
    """Create the pool for the replica; None if the configuration names none.

    Raises:
        BadConfiguration: its connection string cannot be used.
    """
    target = read_target(settings)
    if target is None:
        return None
    for note in target.notes:
        _log.info("connection string", note=note)
    replica = Database(
        target,
        pool_size=settings.db_pool_size,
        max_overflow=settings.db_max_overflow,
        pool_timeout_s=POOL_TIMEOUT_S,
        recycle_s=settings.db_pool_recycle,
        connect_timeout_s=settings.db_connect_timeout,
        hot_pool_size=1,  # Not used.
    )
    return LaggingDatabase(primary, replica, keeper, settings.read_max_lag)
