"""Batches appends: those that arrive during a statement share the next one (group commit).

A *lane* runs one statement at a time. An append that arrives alone is sent immediately; those that
arrive while its statement is in flight are sent together in the next one. Sessions are assigned to
lanes by a hash, so that two lanes of a process never wait for the same session.

A session *runs apart*, in a lane of its own, while its row is locked or a large item is in its
queue. Others then wait for neither. It also runs apart for some seconds after it was deleted here,
or after another writer has delayed its user again (`contention.py`). If the queue of a lane exceeds
one batch, users take turns.

This is correct under READ COMMITTED, with any number of writers and replicas, for these reasons:

- The first part of the statement (INSERT … ON CONFLICT DO UPDATE) locks the session's row and then
  sees its newest version, whatever the statement's snapshot holds. `seq` is counted up from that
  version and assigned in the second part of the same statement. So `seq` has neither gaps nor
  duplicates, and `create_time`, the greater of the session's last and the clock, never decreases.
- The first part inserts in the order of (user_id, id), and takes the locks that it waits for in
  that order, too: batches cannot deadlock. (UPDATE … FROM locks in the order of its plan: 6
  deadlocks in 800 batches, although its input was sorted.)
- Rows that the statement's snapshot cannot see are left to constraints, never to an earlier SELECT.
  A message id that is stored already fails as a unique violation and rolls the whole batch back.
  The batch then runs again, after a look-up of the ids that are stored (a fresh snapshot sees
  them). At the next such failure its sessions run apart.
- A session that was deleted between snapshot and lock would be created again by the INSERT. Unless
  the caller permits that, a division by zero rolls the batch back, and it runs again on a snapshot
  without the session. (A violated constraint would do so, too, but PostgreSQL logs the row.)
- `expected_last_seq` and the archived state are conditions of DO UPDATE, so they hold for the
  locked version. An item that does not meet them has no row in the result, its neighbours are
  stored, and a look-up finds the reason.
- A connection that is lost during a statement leaves the outcome unknown. A look-up of the message
  ids, which every item has, then finds it out. A message may be stored on this server only: the
  look-up's own commit waits until the synchronous standbys have it, too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from service.errors import Conflict, Unavailable
from service.store.append import batches, recovery, sql
from service.store.append.batches import LARGE_ITEM_BYTES, in_turns, take_batch
from service.store.append.contention import Contention
from service.store.append.recovery import Action, final_error
from service.store.append.request import Append, Appended, Key, apply_stored, find_refusal
from service.store.db.batch_window import BatchWindow
from service.store.db.database import Database
from service.store.db.db_errors import (
    DATABASE_ERRORS,
    LOCK_NOT_AVAILABLE,
    WrongRole,
    classify,
    may_have_committed,
    sqlstate,
    to_service_error,
)
from service.store.db.fair_semaphore import FairSemaphore
from service.store.db.hot_pool import Record
from service.store.db.retries import backoff
from service.store.session_tombstones import TombstonePurger, find_tombstones

LOCK_TIMEOUT = "25ms"
"""Time that a shared statement waits for a locked session before its sessions run apart."""
APART_LOCK_TIMEOUT = "75ms"
"""The same for the statement of a session that runs apart, which is then repeated."""
MAX_APART_STATEMENTS = 4
"""Concurrent statements of sessions that run apart, except those with a large item."""
MAX_APART_STATEMENTS_PER_USER = 2
"""Those of one user, whose sessions may all be locked."""
MAX_LARGE_STATEMENTS = 1
"""Concurrent statements with a large item."""
MAX_LOST_RACES = 8
"""Attempts of an item that concurrent writers may defeat before its caller receives an error."""


class Appender:
    """Accepts appends and batches them into shared statements."""

    def __init__(
        self,
        database: Database,
        lanes: int = 2,
        *,
        search_enabled: bool = False,
        raises_synchronous_commit: bool = True,
    ) -> None:
        """Create an appender.

        Args:
            database: Where the messages are stored.
            lanes: Shared statements that may be in flight concurrently.
            search_enabled: Whether appends are enqueued for the search index.
            raises_synchronous_commit: Whether appends set `synchronous_commit` where the server or
                the role has a weaker value.
        """
        self.database = database
        self.loop = asyncio.get_running_loop()
        self.statements = sql.statements(
            enqueues=search_enabled, raises_synchronous_commit=raises_synchronous_commit
        )
        self.tombstones = TombstonePurger(database)
        self.contention = Contention()
        self._lanes = [_Lane(self) for _ in range(lanes)]
        self._apart: dict[Key, _Lane] = {}
        self._apart_permits = FairSemaphore(
            MAX_APART_STATEMENTS, max_held_per_owner=MAX_APART_STATEMENTS_PER_USER
        )
        self._large_permits = FairSemaphore(MAX_LARGE_STATEMENTS)
        self.on_appended: Callable[[str, str], None] = lambda _user_id, _session_id: None
        """Called after each commit, with the user and the session that were appended to."""

    async def append(self, item: Append) -> Appended:
        """Store an item and return the seq and time of each message.

        Cancelling the call withdraws the item while it is queued. Once its statement is in flight,
        the item is stored nevertheless.

        Raises:
            NotFound: the session, or the user of a session to create, does not exist.
            AlreadyExists: another message has one of the ids (MESSAGE_ID_REUSED).
            FailedPrecondition: the session is archived.
            Conflict: `expected_last_seq` does not hold (LAST_SEQ_MISMATCH), or concurrent writers
                defeated too many attempts (CONTENTION).
            Unavailable, DeadlineExceeded: the database does not respond.
        """
        lane = self._apart.get(item.key) or self._lanes[hash(item.key) % len(self._lanes)]
        lane.enqueue(item)
        try:
            return await item.future
        except asyncio.CancelledError:
            item.withdraw()
            raise

    def permits(self, *, for_large_item: bool) -> FairSemaphore:
        """Return the permits for the statements of sessions that run apart."""
        return self._large_permits if for_large_item else self._apart_permits

    def run_apart(self, items: Iterable[Append]) -> None:
        """Give the session of each item a lane of its own until that lane's queue is empty."""
        for item in items:
            lane = self._apart.get(item.key)
            if lane is None:
                lane = self._apart[item.key] = _Lane(self, item.key)
            lane.enqueue(item)

    def rejoin(self, key: Key) -> None:
        """Let the next appends to a session share statements again."""
        self._apart.pop(key, None)

    def is_apart(self, key: Key) -> bool:
        """Whether the session has a lane of its own, or must get one."""
        return key in self._apart or self.contention.covers(key)

    @property
    def queued_count(self) -> int:
        """Items that are not in flight yet."""
        return sum(len(lane.queue) for lane in (*self._lanes, *self._apart.values()))

    async def drain(self, timeout_s: float | None = None) -> None:
        """Wait until no item is queued or in flight; abort the rest after `timeout_s` seconds."""
        abort_at = None if timeout_s is None else self.loop.time() + timeout_s
        while tasks := [
            task
            for task in (
                *(lane.task for lane in (*self._lanes, *self._apart.values())),
                self.tombstones.task,
            )
            if task is not None
        ]:
            remaining_s = None if abort_at is None else abort_at - self.loop.time()
            if remaining_s is not None and remaining_s <= 0:
                # Connections first: the cancellation of a statement waits for its connection.
                self.database.terminate()
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=1)
                return
            await asyncio.wait(tasks, timeout=remaining_s)


class _Lane:
    """A queue, and the task that empties it one statement at a time.

    With a `key`, the lane serves that session only, which runs apart.
    """

    def __init__(self, appender: Appender, key: Key | None = None) -> None:
        self._appender = appender
        self._database = appender.database
        self._key = key
        self.queue: deque[Append] = deque()
        self.task: asyncio.Task[None] | None = None
        self._consecutive_outages = 0
        self._loop = appender.loop
        self._window = BatchWindow()

    def enqueue(self, item: Append) -> None:
        self.queue.append(item)
        if self.task is None:
            self.task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self.queue:
                await self._window.wait(self.queue, batches.MAX_BATCH_MESSAGES)
                await self._run_batch()
        finally:
            self.task = None
            if self._key is not None:
                self._appender.rejoin(self._key)

    async def _run_batch(self) -> None:
        """Run one batch. Each of its items is then answered or back in a queue, whatever failed."""
        batch: list[Append] = []
        is_look_up = False
        try:
            if any(item.look_up_first for item in self.queue):
                batch, is_look_up = self._take_unverified(), True
                await self._look_up(batch)
                self._requeue(batch)
                batch, is_look_up = [], False  # A later error is not theirs.
            if self._key is None:
                self.queue = in_turns(self.queue)
                batch = self._take_batch(accepts_large=False)
                await self._store(batch)
            elif self.queue:
                # The batch is taken with the permit, because callers may time out until then.
                accepts_large = self.queue[0].size_bytes > LARGE_ITEM_BYTES
                permits = self._appender.permits(for_large_item=accepts_large)
                async with permits.hold(self._key[0], None):
                    batch = self._take_batch(accepts_large=accepts_large)
                    await self._store(batch)
            self._consecutive_outages = 0
        except DATABASE_ERRORS as error:
            await self._recover(batch, error, is_look_up=is_look_up)
        except Exception as error:  # noqa: BLE001 - a defect must fail these callers, not hang all
            for item in batch:
                item.fail(error)

    def _take_unverified(self) -> list[Append]:
        """Remove the items that may be stored already from the queue."""
        unverified = [item for item in self.queue if item.look_up_first and not item.future.done()]
        self.queue = deque(item for item in self.queue if not item.look_up_first)
        return unverified

    def _take_batch(self, *, accepts_large: bool) -> list[Append]:
        """Remove the next batch from the queue."""
        divert = self._divert if self._key is None else None
        batch, postponed = take_batch(
            self.queue, self._loop.time(), divert=divert, accepts_large=accepts_large
        )
        self._requeue(postponed)
        return batch

    def _divert(self, item: Append) -> bool:
        """Move an item to the lane of its session if that runs apart or the item is large."""
        if item.size_bytes > LARGE_ITEM_BYTES or self._appender.is_apart(item.key):
            self._appender.run_apart([item])
            return True
        return False

    async def _look_up(self, items: list[Append]) -> dict[Key, Record]:
        """Look up which messages of these items are stored, and answer the items that are complete.

        Returns:
            The sessions of the items that exist.
        """
        if not items:
            return {}
        look_up = self._appender.statements.look_up
        rows = await self._database.fetch_once(look_up, *sql.look_up_arguments(items))
        if rows and rows[0]["is_confirmed"] is False:
            raise WrongRole("the server is a standby")
        stored = {(row["user_id"], row["session_id"], row["id"]): row for row in rows}
        for item in items:
            item.look_up_first = False
            if not item.future.done():
                apply_stored(item, stored)
        return {(row["user_id"], row["session_id"]): row for row in rows}

    async def _store(self, batch: list[Append]) -> None:
        """Run the statement of a batch, and answer its items."""
        if not batch:
            return
        has_derived_ids = any(item.has_derived_id for item in batch)
        statements = self._appender.statements
        statement = statements.append_derived if has_derived_ids else statements.append
        lock_timeout = LOCK_TIMEOUT if self._key is None else APART_LOCK_TIMEOUT
        arguments = sql.append_arguments(batch, lock_timeout, has_derived_ids=has_derived_ids)
        for item in batch:
            item.attempts += 1
        try:
            rows = await self._database.fetch_once(statement, *arguments)
        except DATABASE_ERRORS as error:
            if may_have_committed(error):
                for item in batch:
                    item.may_have_committed = True
            raise
        self._database.outcomes.writes.successes += len(batch)
        sessions = {(row["user_id"], row["session_id"]): row for row in rows}
        left_out = sql.answer(batch, sessions)
        for user_id, session_id in sessions:
            self._appender.on_appended(user_id, session_id)
        if has_derived_ids:
            self._appender.tombstones.wake()
        if left_out:
            await self._resolve_left_out(left_out)

    async def _resolve_left_out(self, items: list[Append]) -> None:
        """Answer or requeue items whose session was missing, archived or not at the expected seq.

        The reasons are checked in the contract's order.
        """
        try:
            sessions = await self._look_up(items)
            # In this order: a session that the look-up does not show may have been deleted.
            tombstones = await find_tombstones(
                self._database, [item.key for item in items if item.has_derived_id]
            )
        except DATABASE_ERRORS as error:
            await self._recover(items, error, is_look_up=True)
            return
        retries: list[Append] = []
        for item in items:
            if item.future.done():
                continue
            item.lost_races += 1
            refusal = find_refusal(item, sessions.get(item.key), tombstones.get(item.key))
            if refusal is not None:
                item.fail(refusal)
            elif item.lost_races >= MAX_LOST_RACES:
                item.fail(
                    Conflict(
                        "the session changes too often; retry",
                        session_id=item.key[1],
                        retry_after=0.1,
                    )
                )
            else:
                retries.append(item)
        self._requeue(retries)

    async def _recover(
        self, batch: list[Append], error: BaseException, *, is_look_up: bool = False
    ) -> None:
        """Requeue the items of a failed statement where they can succeed, or fail them."""
        batch = [item for item in batch if not item.future.done()]
        if is_look_up:
            for item in batch:
                item.attempts += 1
        failed = recovery.FailedBatch(
            classify(error),
            sqlstate(error),
            item_count=len(batch),
            attempts=max((item.attempts for item in batch), default=0),
            is_apart=self._key is not None,
            is_look_up=is_look_up,
        )
        action = recovery.decide(failed)
        failed_calls = len(batch) if action is Action.FAIL else 0
        self._database.retries.report(error, is_write=True, failed_calls=failed_calls)
        await self._execute(action, batch, error)

    async def _execute(self, action: Action, batch: list[Append], error: BaseException) -> None:
        match action:
            case Action.NOTHING:
                await asyncio.sleep(0)
            case Action.WAIT_FOR_DATABASE:
                await self._wait_for_database(batch, error)
            case Action.LOOK_UP:
                self._requeue(batch, look_up_first=True)
            case Action.RETRY:
                await self._retry(batch, error)
            case Action.LOOK_UP_AND_RETRY:
                await self._retry(batch, error, look_up_first=True)
            case Action.RUN_SESSIONS_APART:
                self._appender.run_apart(batch)
            case Action.RUN_ITEMS_ALONE:
                self._requeue(batch, run_alone=True)
            case Action.FAIL:
                for item in batch:
                    item.fail(final_error(item.key[0], error))

    async def _wait_for_database(self, batch: list[Append], error: BaseException) -> None:
        """Requeue a batch to be looked up, and wait before the next statement.

        Items that time out during the wait fail. The wait ends early when no item is left.
        """
        self._requeue(batch, look_up_first=True)
        retry_at = self._loop.time() + backoff(self._consecutive_outages)
        self._consecutive_outages += 1
        while True:
            now = self._loop.time()
            unanswered = [item for item in self.queue if not item.future.done()]
            late = [item for item in unanswered if now >= item.wait_until]
            for item in late:
                item.fail(to_service_error(error) or Unavailable("the database does not respond"))
            if late:
                self._database.retries.report(error, is_write=True, failed_calls=len(late))
            waiting = [item.wait_until for item in unanswered if not item.future.done()]
            if now >= retry_at or not waiting:
                return
            await asyncio.sleep(min(retry_at, *waiting) - now)

    async def _retry(
        self, batch: list[Append], error: BaseException, *, look_up_first: bool = False
    ) -> None:
        """Requeue a batch that lost a race, except for items that have lost too many, and pause."""
        self._appender.contention.add_user(batch[0].key[0])
        now = self._loop.time()
        for item in batch:
            item.lost_races += sqlstate(error) != LOCK_NOT_AVAILABLE
            if item.lost_races >= MAX_LOST_RACES or now >= item.wait_until:
                item.fail(final_error(item.key[0], error))
        unanswered = [item for item in batch if not item.future.done()]
        if len(unanswered) < len(batch):
            failed_calls = len(batch) - len(unanswered)
            self._database.retries.report(error, is_write=True, failed_calls=failed_calls)
        self._requeue(unanswered, look_up_first=look_up_first)
        await asyncio.sleep(backoff(batch[0].attempts, base_s=0.002, cap_s=0.05))

    def _requeue(
        self, items: list[Append], *, look_up_first: bool = False, run_alone: bool = False
    ) -> None:
        """Put items back at the head of the queue, in order, and mark them if asked to."""
        if look_up_first or run_alone:
            for item in items:
                item.look_up_first |= look_up_first
                item.run_alone |= run_alone
        self.queue.extendleft(reversed(items))
