"""Repeats attempts on the database, and takes failed ones as evidence against it.

A deadline is a time of the running loop's clock (`loop.time()`), in seconds. An attempt in flight
is cancelled then, and retries end shortly before, so that the error still reaches the client.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from service.errors import DeadlineExceeded
from service.store.db.db_errors import DATABASE_ERRORS, WrongRole, classify, to_service_error
from service.store.db.driver_connection import LOCK_TIMEOUT_S
from service.store.db.error_log import ErrorLog
from service.store.db.fair_semaphore import AcquireTimeout
from service.store.db.outcomes import Outcomes
from service.store.db.sqlstates import Failure
from service.store.db.work_class import overloaded_error

T = TypeVar("T")

SUSPICIOUS_WAIT_S = 0.5
"""Seconds that a call has waited for the database for its cancellation to suggest an outage."""
MAX_ATTEMPTS = 6
"""Attempts of a transaction that is rolled back by contention."""
MAX_CANCELLED_ATTEMPTS = 3
"""Attempts of a statement that the server cancels."""
OUTAGE_TIMEOUT_S = 15.0
"""Seconds that a call waits for an unavailable database, at most."""
REPLY_MARGIN_S = 0.25
"""Seconds before its deadline at which a waiting call fails, so that the reply still arrives."""


def backoff(attempt: int, *, base_s: float = 0.02, cap_s: float = 1.0) -> float:
    """Return the seconds to wait before the next attempt: full jitter, so that retries spread."""
    return random.uniform(0, min(cap_s, base_s * 2**attempt))  # noqa: S311 - not a secret


def reply_margin_s(deadline: float, now: float) -> float:
    """Return the seconds before its deadline at which a call stops waiting."""
    return min(REPLY_MARGIN_S, (deadline - now) / 4)


def outage_deadline(deadline: float, now: float) -> float:
    """Return when a call stops waiting for an unavailable database, on the event loop's clock."""
    return min(deadline - reply_margin_s(deadline, now), now + OUTAGE_TIMEOUT_S)


class Retries:
    """The retries of one database's calls."""

    def __init__(self, outcomes: Outcomes, on_suspected_outage: Callable[[], None]) -> None:
        """Create it.

        Args:
            outcomes: Receives the errors, as evidence about reads and writes.
            on_suspected_outage: Called when a call has shown, or suggests, that the database is
                unavailable.
        """
        self.rejected_count = 0
        """Calls that found no connection in time, because others used them all."""
        self.on_wrong_role: Callable[[], None] = lambda: None
        """Called when a server was a standby: other connections may lead to it, too."""
        self._outcomes = outcomes
        self._on_suspected_outage = on_suspected_outage
        self._error_log = ErrorLog()
        self._loop = asyncio.get_running_loop()

    async def run(
        self,
        attempt: Callable[[float], Awaitable[T]],
        deadline: float,
        error: BaseException | None = None,
        suspicious_wait_s: float = SUSPICIOUS_WAIT_S,
        *,
        is_write: bool = False,
    ) -> T:
        """Repeat attempts until one succeeds, an error is final, or the time is up.

        Args:
            attempt: Is passed the time until which it may wait for a connection.
            deadline: The call's deadline.
            error: The error of a first attempt by the caller, if there was one.
            suspicious_wait_s: Seconds after which the end of the caller's time suggests an outage.
            is_write: Whether the attempts are evidence about writes, and not about reads.
        """
        now = self._loop.time()
        wait_until = outage_deadline(deadline, now)
        # An attempt in flight at `wait_until` may still end with an error that says more.
        end_at = deadline - reply_margin_s(deadline, now) / 2
        attempts = 0
        while True:
            if error is not None:
                await self._back_off(error, attempts, wait_until, is_write=is_write)
                attempts += 1
            started_at = self._loop.time()
            scope = asyncio.timeout_at(end_at)
            try:
                async with scope:
                    return await attempt(wait_until)
            except DATABASE_ERRORS as attempt_error:
                if scope.expired():
                    self.suspect_outage(started_at, suspicious_wait_s)
                    raise DeadlineExceeded("the database did not respond in time") from None
                if not isinstance(attempt_error, AcquireTimeout):
                    error = attempt_error
                elif error is None:  # An earlier error says more about the cause.
                    if attempt_error.is_busy:
                        self.rejected_count += 1
                        raise overloaded_error() from None
                    error = attempt_error
            except asyncio.CancelledError:
                self.suspect_outage(started_at, suspicious_wait_s)
                raise

    async def _back_off(
        self, error: BaseException, attempts: int, wait_until: float, *, is_write: bool
    ) -> None:
        """Wait before the next attempt, or raise the caller's error when there is none."""
        failure = classify(error)
        pause = backoff(attempts)
        if failure is Failure.LOCKED:
            wait_until -= LOCK_TIMEOUT_S  # The next attempt may time out on the lock, too.
        may_retry = self._may_retry(failure, attempts) and self._loop.time() + pause < wait_until
        self.report(error, is_write=is_write, failed_calls=0 if may_retry else 1)
        if may_retry:
            await asyncio.sleep(pause)
            return
        service_error = to_service_error(error)
        if service_error is None:
            raise error
        raise service_error from None

    @staticmethod
    def _may_retry(failure: Failure, attempts: int) -> bool:
        match failure:
            case Failure.CONTENTION:
                return attempts + 1 < MAX_ATTEMPTS
            case Failure.CANCELLED:
                return attempts + 1 < MAX_CANCELLED_ATTEMPTS
            case Failure.LOCKED | Failure.LOST | Failure.OUTAGE:
                return True
            case _:
                return False

    def report(
        self, error: BaseException, *, is_write: bool = False, failed_calls: int = 0
    ) -> None:
        """Take a database error as evidence against the database, and log its cause.

        Args:
            error: The error.
            is_write: Whether the work was a write.
            failed_calls: Number of calls that fail with it; 0 if the work is repeated.
        """
        self._error_log.add(error)
        if isinstance(error, WrongRole):
            self.on_wrong_role()
        if self._outcomes.report(error, is_write=is_write, failed_calls=failed_calls):
            self._on_suspected_outage()

    def suspect_outage(self, started_at: float, wait_s: float = SUSPICIOUS_WAIT_S) -> None:
        """Report a suspected outage if an unsuccessful call has waited for long enough."""
        if self._loop.time() - started_at > wait_s:
            self._on_suspected_outage()
