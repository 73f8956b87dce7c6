"""Counts the outcomes of work in the database, and judges by them whether reads and writes work.

What callers get decides over what a probe says: while most calls succeed a half works, although no
further connection can be opened; while most fail it does not, although a probe succeeds. Without
calls the probe decides.

Successes cost one addition each. Everything else runs after an error, or once for each probe.
"""

from __future__ import annotations

import asyncio
from collections import deque
from math import inf

from service.store.db.db_errors import READ_ONLY, describe, rule, sqlstate
from service.store.db.sqlstates import Failure, Scope

WINDOW_S = 5.0
"""Seconds of outcomes by which a half is judged to fail although a probe succeeds."""
MIN_FAILURES = 3
"""Failures in this time that count as more than accidents."""
FIRST_HOLD_S, MAX_HOLD_S = 5.0, 60.0
"""Seconds for which a half counts as down after callers got errors although a probe succeeded. They
double when it happens again soon, so that readiness does not flap: a replica that is not ready gets
no calls, whose outcomes would show that the fault lasts."""
LOCK_CHECK_INTERVAL_S = 5.0
"""Seconds between two reports of lock timeouts that cause a probe: a hot row has many of them."""


class Tally:
    """Outcomes of one half of the work, reads or writes."""

    __slots__ = ("cause", "failures", "lock_failures", "successes")

    def __init__(self) -> None:
        self.successes = 0
        self.failures = 0
        """Calls that failed because of the database."""
        self.lock_failures = 0
        """Calls that failed because they waited for a lock: of a row, or of a whole table."""
        self.cause = ""
        """The cause of the last failure."""


class Outcomes:
    """The outcomes of reads and writes since they were taken last."""

    def __init__(self) -> None:
        self.reads, self.writes = Tally(), Tally()
        self.suspects: set[str] = set()
        """SQLSTATEs that were reported since the last probe, which checks what may cause them."""
        self._loop = asyncio.get_running_loop()
        self._since = -inf
        self._locks_reported_at = -inf

    def report(self, error: BaseException, *, is_write: bool, failed_calls: int) -> bool:
        """Count a database error.

        Args:
            error: The error.
            is_write: Whether the work was a write.
            failed_calls: Number of calls that fail with it; 0 if the work is repeated.

        Returns:
            Whether the error calls for a probe.
        """
        self.discard_old()
        known, state = rule(error), sqlstate(error)
        tally = self.writes if is_write else self.reads
        if known.failure is Failure.LOCKED:
            tally.lock_failures += failed_calls
            return self._suspect_table_lock(state)
        if known.scope is Scope.NOTHING:
            return known.failure in (Failure.LOST, Failure.OUTAGE)
        if state is not None:
            self.suspects.add(state)
        if known.scope is Scope.WRITES and state != READ_ONLY:
            # Calls that wait for space fail much later. (A probe finds out whether the database is
            # read-only, and one connection that was opened too early proves nothing.)
            failed_calls = max(1, failed_calls)
        if failed_calls:
            tally.failures += failed_calls
            tally.cause = describe(error)
        return True

    def discard_old(self) -> None:
        """Begin to count again if the outcomes go back further than the window.

        The successes of the hour before an outage say nothing about it.
        """
        if self._loop.time() - self._since > WINDOW_S:
            self.take()

    def take(self) -> tuple[Tally, Tally]:
        """Return the outcomes of reads and of writes, and begin to count again."""
        taken = self.reads, self.writes
        self.reads, self.writes = Tally(), Tally()
        self._since = self._loop.time()
        return taken

    def _suspect_table_lock(self, state: str | None) -> bool:
        now = self._loop.time()
        if now - self._locks_reported_at < LOCK_CHECK_INTERVAL_S:
            return False
        self._locks_reported_at = now
        self.suspects.add(state or "")
        return True


class Judge:
    """Judges one half of the work, once for each probe."""

    def __init__(self) -> None:
        self.problem = "the database has not been probed yet"
        """Why the half does not work; empty if it works."""
        self._is_proved = False
        """Whether the last probe found no problem."""
        self._window: deque[tuple[float, Tally]] = deque()
        self._held_until = -inf
        self._hold_s = FIRST_HOLD_S

    def judge(self, probed: str, tally: Tally, now: float, *, table_lock: str = "") -> str:
        """Judge the half, and return its problem; empty if it works.

        Args:
            probed: The problem that the probe found; empty if there is none.
            tally: The outcomes of the half since the last judgement.
            now: The time of the event loop's clock.
            table_lock: The lock on a whole table that the probe found, if any.
        """
        is_recovered = not probed and not self._is_proved
        self._is_proved = not probed
        if is_recovered:
            # The probe saw the outage and its end: the outcomes are those of the outage.
            self._window.clear()
            self._held_until = -inf
            self.problem = ""
            return ""
        self._window.append((now, tally))
        while self._window[0][0] < now - WINDOW_S:
            self._window.popleft()
        failures, lock_failures = tally.failures, tally.lock_failures
        if tally.successes > failures + lock_failures:
            self._held_until = -inf
            self.problem = ""
        elif probed:
            self.problem = probed
        elif table_lock and (self._mostly_fails(with_locks=True) or self.problem == table_lock):
            self.problem = table_lock
        elif failures and self._mostly_fails():
            self._hold(now)
            self.problem = tally.cause
        elif now >= self._held_until:
            self.problem = ""
        return self.problem

    def _mostly_fails(self, *, with_locks: bool = False) -> bool:
        tallies = [tally for _, tally in self._window]
        failures = sum(tally.failures + with_locks * tally.lock_failures for tally in tallies)
        return failures >= MIN_FAILURES and failures > sum(tally.successes for tally in tallies)

    def _hold(self, now: float) -> None:
        if not self.problem:
            is_again_soon = now - self._held_until < self._hold_s
            self._hold_s = min(self._hold_s * 2, MAX_HOLD_S) if is_again_soon else FIRST_HOLD_S
        self._held_until = now + self._hold_s
