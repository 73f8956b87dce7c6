"""Notices that the database has gone back in time, and declares it a new epoch of the history.

A dump that is restored under the running service, a copy of the data folder that is put back, and
an asynchronous failover all take back commits that the service has seen. The search index, and
clients that follow a session, then hold what PostgreSQL does not.

The table `history_epoch` has one row: the id of the epoch and a counter. Every process raises the
counter after its appends, at most once a second, and before each write to the search index, and
remembers the highest value. The index stores the value, too. A lower value in PostgreSQL is a
restore. The process that notices it stores a new epoch with a counter far above all values that
were seen. The other processes recognise the new epoch, and end their watches as well. A failover
that lost nothing leaves the counter at least as high as it was, so that nothing happens.

A sequence cannot replace the row: it is not transactional, and its log record runs ahead of its
value, so that a database which has lost its last commits can show a higher value than before.

The counter is compared after an outage of the database, after appends, at the polls of the watches,
and after searches. An idle service sends nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import structlog

from service.store.db.database import Database
from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.hot_pool import Statement
from service.store.history_mark import Mark, follows_declaration, is_restore

INTERVAL_S = 1.0
"""Seconds between two statements that traffic causes, at least."""
WARNING_INTERVAL_S = 60.0
"""Seconds between two warnings that the mark cannot be read, at least."""
DECLARED_STEP = 1_000_000
"""Added to the counter by a declaration.

The result exceeds what any other process has seen, so that each recognises the declaration and none
takes it for a restore.
"""

_READ = Statement.from_text(
    "SELECT epoch::text, counter FROM chathistory.history_epoch WHERE id = 1"
)

# Inserts the row if it was lost: its new id then is that of a new epoch.
_RAISE = Statement.from_text("""
INSERT INTO chathistory.history_epoch AS e (id) VALUES (1)
ON CONFLICT (id) DO UPDATE SET counter = e.counter + 1
RETURNING e.epoch::text, e.counter
""")

# One of several processes changes the row. A standby rejects the statement: its lag is no restore.
_DECLARE = Statement.from_text("""
UPDATE chathistory.history_epoch AS e SET
    epoch = gen_random_uuid(), counter = greatest(e.counter, $2::bigint)
WHERE e.id = 1 AND e.epoch = $1::uuid
RETURNING e.epoch::text, e.counter
""")

_log = structlog.get_logger(__name__)


class EpochKeeper:
    """The mark of one database as this process knows it."""

    def __init__(self, database: Database) -> None:
        self.mark: Mark | None = None
        """The latest mark of the database that this process has seen; None before the first one."""
        self.on_restored: list[Callable[[], None]] = []
        """Called when the database has gone back in time."""
        self.on_raised: Callable[[Mark, float], None] = lambda _mark, _time: None
        """Called with each mark that this process has stored, and the loop's time before that."""
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._declaration_lock = asyncio.Lock()
        self._due_at = self._loop.time() + INTERVAL_S
        self._warning_due_at = -math.inf
        self._pending: Callable[[], Awaitable[Mark]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_stopped = False

    def wake(self) -> None:
        """Raise the counter in the background if that is due; called after appends."""
        if self._loop.time() >= self._due_at:
            self.raise_soon()

    def raise_soon(self) -> None:
        """Raise the counter in the background; called before reads of a replica."""
        self._start(self.raise_mark)

    def look(self) -> None:
        """Read the mark in the background if that is due; called after searches."""
        if self._loop.time() >= self._due_at:
            self.check_soon()

    def check_soon(self) -> None:
        """Read the mark in the background; called when an outage of the database has ended."""
        self._start(self._pending or self.read)

    def compare(self, stored: Mark, known: Mark | None) -> None:
        """Compare a mark that another statement has read, and look at the database if it differs.

        Args:
            stored: The mark that was read.
            known: `mark` when that statement was sent.
        """
        if known is not None and (stored.epoch != known.epoch or stored.counter < known.counter):
            self.look()

    async def read(self) -> Mark:
        """Read the mark, and compare it with the known one.

        Returns:
            The mark of the database; that of a new epoch if this call has declared one.

        Raises:
            Any of `DATABASE_ERRORS`.
        """
        return await self._observe(_READ)

    async def raise_mark(self) -> Mark:
        """Raise the counter, and compare it with the known one.

        A commit that a read has returned before this call is lost only together with the raised
        counter.

        Returns:
            The raised mark; that of a new epoch if this call has declared one.

        Raises:
            Any of `DATABASE_ERRORS`.
        """
        started_at = self._loop.time()
        mark = await self._observe(_RAISE)
        self.on_raised(mark, started_at)
        return mark

    async def stop(self) -> None:
        """End the statement in the background, and start no other."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None  # A task that had not begun has not done so itself.

    def _start(self, action: Callable[[], Awaitable[Mark]]) -> None:
        self._due_at = self._loop.time() + INTERVAL_S
        self._pending = action
        # One statement at a time: a restore locks the table for as long as it runs.
        if self._task is None and not self._is_stopped:
            self._task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._pending is not None:
                action, self._pending = self._pending, None
                try:
                    await action()
                except DATABASE_ERRORS as error:
                    self._warn(error)
        finally:
            self._task = None

    def _warn(self, error: BaseException) -> None:
        """Log that the mark is not known, once a minute. The next traffic tries again."""
        if self._loop.time() >= self._warning_due_at:
            self._warning_due_at = self._loop.time() + WARNING_INTERVAL_S
            _log.warning("history epoch not read", error=type(error).__name__)

    async def _observe(self, statement: Statement) -> Mark:
        # Statements overlap, and an older result may arrive last. Each is therefore compared with
        # the mark that was known when it was sent.
        known = self.mark
        stored = await self._fetch(statement)
        if known is not None and is_restore(known, stored):
            async with self._declaration_lock:
                stored = await self._declare(known, stored)
        self._adopt(stored)
        return stored

    async def _declare(self, known: Mark, stored: Mark) -> Mark:
        """Store a new epoch, unless another process has done so; return the mark of the database.

        Args:
            known: A mark that the database held earlier.
            stored: The mark that it held afterwards, and that shows the restore.
        """
        while is_restore(known, stored):
            seen_counter = max(known.counter, self.mark.counter if self.mark else 0)
            stored = await self._fetch(_DECLARE, stored.epoch, seen_counter + DECLARED_STEP)
        return stored

    def _adopt(self, stored: Mark) -> None:
        """Remember a mark if it is later than the known one."""
        known = self.mark
        if known is None or (stored.epoch == known.epoch and stored.counter > known.counter):
            self.mark = stored
        elif follows_declaration(known, stored):
            self.mark = stored
            _log.warning(
                "history restored",
                epoch=stored.epoch,
                counter=stored.counter,
                known_counter=known.counter,
            )
            for callback in self.on_restored:
                callback()

    async def _fetch(self, statement: Statement, *arguments: Any) -> Mark:
        """Run a statement, and return its mark, or else that of the database."""
        fetch = self._database.fetch_once
        rows = await fetch(statement, *arguments) or await fetch(_READ) or await fetch(_RAISE)
        return Mark(*rows[0])
