"""A lane of appends: a queue, and the task that empties it one statement at a time.

Appends are correct under READ COMMITTED, with any number of writers and replicas, for these
reasons:

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
from typing import TYPE_CHECKING

from service.errors import Conflict, Unavailable
from service.store.append import batches, recovery, sql
from service.store.append.batches import LARGE_ITEM_BYTES, in_turns, take_batch
from service.store.append.recovery import Action, final_error
from service.store.append.request import Append, Key, apply_stored, find_refusal
from service.store.db.batch_window import BatchWindow
from service.store.db.db_errors import (
    DATABASE_ERRORS,
    LOCK_NOT_AVAILABLE,
    WrongRole,
    classify,
    may_have_committed,
    sqlstate,
    to_service_error,
)
from service.store.db.hot_pool import Record
from service.store.db.retries import backoff
from service.store.session_tombstones import find_tombstones

if TYPE_CHECKING:
    from service.store.append.appender import Appender

LOCK_TIMEOUT = "25ms"
"""Time that a shared statement waits for a locked session before its sessions run apart."""
APART_LOCK_TIMEOUT = "75ms"
"""The same for the statement of a session that runs apart, which is then repeated."""
MAX_LOST_RACES = 8
"""Attempts of an item that concurrent writers may defeat before its caller receives an error."""


class Lane:
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
