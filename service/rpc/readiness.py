"""Readiness: whether reads and writes can be served, by the latest evidence.

The database is probed only after a call suggests that it fails, and then every second until it does
what it must. An idle database is left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from math import inf

import structlog

from service.store.db.database import Database
from service.store.db.db_errors import DATABASE_ERRORS, describe
from service.store.db.outcomes import Judge, Tally
from service.store.db.proofs import Problems
from service.store.schema.location import UnusableDatabase

PROBE_INTERVAL_S = 1.0
"""Pause between two probes while anything is wrong."""
PROBE_TIMEOUT_S = 2.0
"""Timeout of each step of a probe."""
OBSERVATION_S = 0.5
"""Seconds in which callers may prove that the database works although a probe has failed."""
LOG_INTERVAL_S = 10.0
"""Seconds between two log lines about one outage, if its problem changes."""

_log = structlog.get_logger(__name__)


class Half(StrEnum):
    """A half of the work that the service does in the database."""

    READS = "reads"
    WRITES = "writes"


class Readiness:
    """Whether calls can be served, by what callers get and what probes find (`outcomes.Judge`).

    Neither half counts as working until the database has answered and its schema fits.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._judges = {half: Judge() for half in Half}
        self.problems = {half: judge.problem for half, judge in self._judges.items()}
        """Why each half does not work, for the log; empty if it works."""
        self._logged_at = -inf
        self._logged_problems: dict[Half, str] = {}
        self._is_draining = False
        self._probe_requested = False
        self.probe_task: asyncio.Task[None] | None = None
        """Probes the database until it works; None while no failure suggests an outage."""
        self._subscriptions: set[asyncio.Event] = set()
        self._was_ready = asyncio.Event()
        self.on_success: Callable[[], None] = lambda: None
        """Called after each probe that has found no problem."""

    @property
    def is_ready(self) -> bool:
        """Whether reads and writes can be served."""
        return not self.problem

    @property
    def problem(self) -> str:
        """Why the service is not ready; empty if it is."""
        return self.problems[Half.READS] or self.problems[Half.WRITES]

    def is_up(self, half: Half) -> bool:
        """Return whether a half works."""
        return not self.problems[half]

    def request_probe(self) -> None:
        """Probe the database, since a failed call suggests that it may not work."""
        self._database.outcomes.discard_old()
        self._probe_requested = True
        if self.probe_task is None and not self._is_draining:
            self.probe_task = self._loop.create_task(self._probe())

    async def wait_ready(self) -> None:
        """Wait until the service has been ready at least once."""
        await self._was_ready.wait()

    def drain(self) -> None:
        """Report NOT_SERVING until the process ends, and stop probing."""
        self._is_draining = True
        if self.probe_task is not None:
            self.probe_task.cancel()
        self._update(dict.fromkeys(Half, "shutting down"))

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
            while True:
                self._probe_requested = False
                problems = await self._find_problems()
                if self.is_ready and problems.is_failing and not problems.schema:
                    await asyncio.sleep(OBSERVATION_S)
                self._judge(problems)
                if not problems.is_failing:
                    self.on_success()
                is_over = not problems.is_failing and problems.table_lock is None
                if is_over and self.is_ready and not self._probe_requested:
                    return
                await asyncio.sleep(PROBE_INTERVAL_S)
        finally:
            self.probe_task = None

    async def _find_problems(self) -> Problems:
        try:
            return await self._database.prober.probe(PROBE_TIMEOUT_S)
        except TimeoutError:
            # The database vanished without closing its connections. Terminating them ends the calls
            # that wait on them, which would otherwise wait for their own timeouts.
            self._database.hot_pool.terminate()
            problem = "the database does not answer in time"
        except UnusableDatabase as error:
            return Problems(schema=str(error))
        except DATABASE_ERRORS as error:
            problem = describe(error)
        except Exception as error:  # noqa: BLE001 - if probing ended, the service would never be ready
            return Problems(schema=f"the schema cannot be read ({type(error).__name__})")
        return Problems(reads=problem, writes=problem)

    def _judge(self, problems: Problems) -> None:
        if self._is_draining:
            return
        reads, writes = self._database.outcomes.take()
        if problems.schema:
            # Calls that succeed may damage a newer schema.
            reads, writes = Tally(), Tally()
        now, table_lock = self._loop.time(), str(problems.table_lock or "")
        inputs = {Half.READS: (problems.reads, reads), Half.WRITES: (problems.writes, writes)}
        self._update(
            {
                half: self._judges[half].judge(
                    problems.schema or problem, tally, now, table_lock=table_lock
                )
                for half, (problem, tally) in inputs.items()
            }
        )

    def _update(self, problems: dict[Half, str]) -> None:
        has_changed = any(bool(problems[half]) == self.is_up(half) for half in Half)
        self.problems = problems
        if self.is_ready:
            self._was_ready.set()
        self._log(has_changed=has_changed)
        if has_changed:
            self.notify()

    def _log(self, *, has_changed: bool) -> None:
        """Log a change: of a half immediately, of an outage's problem once in some seconds."""
        now = self._loop.time()
        is_due = has_changed or now - self._logged_at > LOG_INTERVAL_S
        if self.problems == self._logged_problems or not is_due:
            return
        self._logged_at, self._logged_problems = now, self.problems
        if self.is_ready:
            _log.info("ready")
        else:
            _log.warning(
                "not ready",
                reads=self.problems[Half.READS] or "work",
                writes=self.problems[Half.WRITES] or "work",
            )
