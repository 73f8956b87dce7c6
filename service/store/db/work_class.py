"""Classes of database work, and the admission of expensive work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum, auto

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import DeadlineExceeded, Overloaded
from service.store.db.db_errors import classify
from service.store.db.fair_semaphore import AcquireTimeout, FairSemaphore, QueueFull
from service.store.db.sqlstates import Failure

STATEMENT_TIMEOUT_S = 5.0
"""Seconds that a statement of expensive work may take."""
MAX_WAIT_S = 5.0
"""Seconds that expensive work waits for a permit."""
MAX_PERMITS = 3
"""Expensive work in progress; PostgreSQL often shares its processors with the service."""
MAX_WAITING_PER_USER = 32
MAX_WAITING = 256
"""Expensive work that may wait, of one user and of all."""
RETRY_AFTER_S = 1.0
REJECTION_PAUSE_S = 0.25
"""Seconds before a call is rejected because too many wait. gRPC takes up one call of a method at a
time: the calls of clients that retry immediately would always wait there, in front of those of
other users."""

_SET_LIMITS = sa.select(
    sa.func.set_config("statement_timeout", sa.bindparam("timeout", type_=sa.Text()), True),
    # Parallel workers would use the processors that the permits leave to others.
    sa.func.set_config("max_parallel_workers_per_gather", "0", True),
)


class WorkClass(Enum):
    """How much of the database a piece of work may use."""

    ORDINARY = auto()
    """Reads and writes a bounded number of rows by their keys."""
    EXPENSIVE = auto()
    """May read or write much: search, export, large pages, deletes in slices."""


class ExpensiveWork:
    """Admits expensive work: few permits, in rotation between users, with a bounded queue.

    One user leaves a permit to the others if there are several. A statement that is admitted ends
    within STATEMENT_TIMEOUT_S.
    """

    def __init__(self, connection_count: int) -> None:
        """Derive the permits from the connections that hot statements leave to other work."""
        permit_count = max(1, min(MAX_PERMITS, connection_count // 3))
        self.permits = FairSemaphore(
            permit_count,
            max_held_per_owner=max(1, permit_count - 1),
            max_waiting_per_owner=MAX_WAITING_PER_USER,
            max_waiting=MAX_WAITING,
        )
        self.rejected_count = 0
        self._loop = asyncio.get_running_loop()

    @property
    def in_progress_count(self) -> int:
        """Number of permits that are held."""
        return self.permits.permit_count - self.permits.free_count

    @asynccontextmanager
    async def permit(
        self, work_class: WorkClass, owner_id: str, wait_until: float
    ) -> AsyncIterator[None]:
        """Hold a permit during the block if the work is expensive.

        Args:
            work_class: The class of the work.
            owner_id: The user in whose turn it waits.
            wait_until: When it stops waiting, in seconds on the running loop's clock.

        Raises:
            Overloaded: too much expensive work waits, or none of it ended within MAX_WAIT_S.
        """
        if work_class is not WorkClass.EXPENSIVE:
            yield
            return
        hold = self.permits.hold(owner_id, min(MAX_WAIT_S, wait_until - self._loop.time()))
        try:
            await hold.__aenter__()
        except QueueFull:
            self.rejected_count += 1
            await asyncio.sleep(REJECTION_PAUSE_S)
            raise overloaded_error() from None
        except AcquireTimeout:
            self.rejected_count += 1
            raise overloaded_error() from None
        try:
            yield
        finally:
            await hold.__aexit__(None, None, None)

    @asynccontextmanager
    async def limits(
        self, work_class: WorkClass, connection: AsyncConnection, wait_until: float
    ) -> AsyncIterator[None]:
        """Limit the statements of a block to STATEMENT_TIMEOUT_S if the work is expensive.

        The limits are set by a statement, for one transaction: a transaction pooler rejects them as
        start-up parameters.

        Args:
            work_class: The class of the work.
            connection: Its connection, outside a transaction; the block runs in one.
            wait_until: When its statements end even earlier, on the running loop's clock.

        Raises:
            DeadlineExceeded: a statement took longer.
        """
        if work_class is not WorkClass.EXPENSIVE:
            yield
            return
        time_left_s = wait_until - self._loop.time()
        # PostgreSQL takes 0 for no timeout.
        timeout_ms = max(1, int(min(STATEMENT_TIMEOUT_S, time_left_s) * 1000))
        await connection.execute(_SET_LIMITS, {"timeout": str(timeout_ms)})
        try:
            yield
        except Exception as error:
            if classify(error) is not Failure.CANCELLED:
                raise
            if time_left_s > STATEMENT_TIMEOUT_S:
                raise _too_expensive_error() from None
            raise DeadlineExceeded("the database did not respond in time") from None


def overloaded_error() -> Overloaded:
    """Return the error of a call that would wait too long behind others for a connection."""
    return Overloaded(
        "too many calls wait for the database; retry after the given delay",
        retry_after=RETRY_AFTER_S,
    )


def _too_expensive_error() -> DeadlineExceeded:
    return DeadlineExceeded(
        f"a query of this request took longer than {STATEMENT_TIMEOUT_S:g} s, the limit for one "
        "query; ask for less, for example with fewer words or within one session"
    )
