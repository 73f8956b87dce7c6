"""The hot path: appends that arrive while a statement is under way share the next one (group commit).

A *lane* runs one statement at a time. The first append leaves at once; those that come meanwhile leave together. Sessions are dealt
to lanes by a hash, so two lanes of a process never wait for the same session.

Why this is correct under READ COMMITTED, with any number of writers and replicas:

- The row of a session is locked by the statement's first part (INSERT … ON CONFLICT DO UPDATE), which then sees the row's newest
  version whatever the statement's snapshot says; `seq` is counted up from that version and given out in the second part of the same
  statement. So `seq` has no gap and no tie, and `create_time`, the greater of the session's last and the clock, never goes backwards.
- The first part inserts in the order of (user_id, id), and a lock that it waits for is taken in that order too: batches cannot
  deadlock. (UPDATE … FROM locks in the order of its plan: 6 deadlocks in 800 batches although its input was sorted.)
- What a statement's snapshot cannot see is left to constraints, never to a look before: an id that is there already fails as a unique
  violation and rolls the whole batch back. The batch then runs again, this time asking first which ids are stored (a fresh snapshot
  sees them), and at the next such failure its sessions run apart.
- A session that was deleted between snapshot and lock would be made anew by the INSERT; where nobody gave leave for that, `seq`
  comes out NULL, the NOT NULL constraint rolls the batch back, and it runs again on a snapshot that lacks the session.
- `expected_last_seq` and the archived state are conditions of DO UPDATE, so they hold for the locked version. An item that does not
  meet them simply has no row in the answer, its neighbours are stored, and a second look finds out why.
- A connection lost in mid-statement leaves the outcome unknown; the message ids, which every item has by then, decide it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from service.errors import Conflict, DeadlineExceeded, Unavailable
from service.store.append import recovery, sql
from service.store.append.recovery import LOCK_NOT_AVAILABLE, Action, final_error
from service.store.append.request import Append, Appended, Entry, Key, note_replays, refusal_of
from service.store.db.batch_window import BatchWindow
from service.store.db.database import DATABASE_ERRORS, Database, backoff
from service.store.db.db_errors import Failure, classify, constraint, sqlstate, to_service_error
from service.store.db.hot_pool import Record

MAX_BATCH_MESSAGES = 512
"""Messages in one statement."""
MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Text in one statement, roughly; a single item may be larger."""
LOCK_TIMEOUT = "75ms"
"""How long a statement waits for a locked session before that session is run apart from its neighbours."""
APART_STATEMENTS = 4
"""Statements of sessions run apart that are under way at once."""
MAX_LOST_RACES = 8
"""Tries of an item in which others came first, before the caller is told."""


class Appender:
    """Takes appends and shares statements among them."""

    def __init__(self, database: Database, lanes: int = 2, *, search_enabled: bool = False) -> None:
        """Take `lanes` statements under way at once; `owed`: whether the search index owes what is appended."""
        self.database = database
        self.loop = asyncio.get_running_loop()
        self.statement = sql.APPEND_AND_ENQUEUE if search_enabled else sql.APPEND
        self._lanes = [_Lane(self) for _ in range(lanes)]
        self._apart: dict[Key, _Lane] = {}
        self.apart_permits = asyncio.Semaphore(APART_STATEMENTS)
        self.on_appended: Callable[[str, str], None] = lambda _user_id, _session_id: None
        """Called after a commit, with the session that grew."""

    async def append(self, item: Append) -> Appended:
        """Store the item and return where its messages stand.

        A caller that is cancelled before the item has left withdraws it; after that it is stored all the same.

        Raises:
            NotFound: the session, or the user of a session to make, is not there.
            AlreadyExists: a message id is taken by another message (MESSAGE_ID_REUSED).
            FailedPrecondition: the session is archived.
            Conflict: `expected_last_seq` does not hold (LAST_SEQ_MISMATCH), or others were in the way for too long.
            Unavailable, DeadlineExceeded: the database does not answer.
        """
        lane = self._apart.get(item.key) or self._lanes[hash(item.key) % len(self._lanes)]
        lane.put(item)
        return await item.future

    def run_apart(self, items: Iterable[Append]) -> None:
        """Give the sessions of these items a lane each until those have caught up."""
        for item in items:
            lane = self._apart.get(item.key)
            if lane is None:
                lane = self._apart[item.key] = _Lane(self, item.key)
            lane.put(item)

    def rejoin(self, key: Key) -> None:
        """Note that the session has caught up: its next appends share statements again."""
        self._apart.pop(key, None)

    def is_apart(self, key: Key) -> bool:
        """Whether the session has a lane of its own now."""
        return key in self._apart

    @property
    def queued_count(self) -> int:
        """How many items have not left yet."""
        return sum(len(lane.queue) for lane in (*self._lanes, *self._apart.values()))

    async def drain(self, patience: float | None = None) -> None:
        """Wait until nothing is queued or under way; what takes longer than `patience` seconds is given up."""
        give_up = None if patience is None else self.loop.time() + patience
        while tasks := [
            lane.task for lane in (*self._lanes, *self._apart.values()) if lane.task is not None
        ]:
            left = None if give_up is None else give_up - self.loop.time()
            if left is not None and left <= 0:
                # The connections first: a statement that is only cancelled would be waited for.
                self.database.terminate()
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=1)
                return
            await asyncio.wait(tasks, timeout=left)


class _Lane:
    """A queue and the task that empties it, one statement at a time. With a `key` it serves that session alone."""

    def __init__(self, appender: Appender, key: Key | None = None) -> None:
        self._appender = appender
        self._database = appender.database
        self._key = key
        self.queue: deque[Append] = deque()
        self.task: asyncio.Task[None] | None = None
        self._outages = 0
        """Times in a row that the database was away."""
        self._loop = appender.loop
        self._gather = BatchWindow()

    def put(self, item: Append) -> None:
        self.queue.append(item)
        if self.task is None:
            self.task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self.queue:
                await self._gather.wait(self.queue, MAX_BATCH_MESSAGES)
                await self._step()
        finally:
            self.task = None
            if self._key is not None:
                self._appender.rejoin(self._key)

    async def _step(self) -> None:
        """Run one batch; whatever happens, each of its items is answered or back in the queue."""
        batch: list[Append] = []
        try:
            if any(item.check for item in self.queue):
                batch = self._take_suspects()
                await self._look_up(batch)
                self._again(batch)
            batch = self._take()
            if self._key is None:
                await self._store(batch)
            else:
                async with self._appender.apart_permits:
                    await self._store(batch)
            self._outages = 0
        except DATABASE_ERRORS as error:
            await self._recover(batch, error)
        except Exception as error:  # noqa: BLE001 - a defect must fail its callers, not hang them and all that come later
            for item in batch:
                item.fail(error)

    def _take_suspects(self) -> list[Append]:
        """Take those items off the queue that may be stored already."""
        suspects = [item for item in self.queue if item.check and not item.future.done()]
        self.queue = deque(item for item in self.queue if not item.check)
        return suspects

    def _take(self) -> list[Append]:
        """Take the next batch off the queue, in order; drop what nobody waits for."""
        now = self._loop.time()
        batch: list[Append] = []
        later: list[Append] = []
        groups: dict[Key, list[Append]] = {}
        messages = size = 0
        queue = self.queue
        while queue and messages < MAX_BATCH_MESSAGES and size < MAX_BATCH_BYTES:
            item = queue.popleft()
            if item.future.done():
                continue
            if now >= item.deadline:
                item.fail(DeadlineExceeded("the deadline passed before the append could be tried"))
                continue
            if self._key is None and self._appender.is_apart(item.key):
                self._appender.run_apart([item])
                continue
            group = groups.setdefault(item.key, [])
            if (group and _collides(group, item)) or (item.run_alone and batch):
                group.append(item)  # What follows in this session must not overtake it.
                later.append(item)
                continue
            group.append(item)
            batch.append(item)
            messages += len(item.pending)
            size += item.size
            if item.run_alone:
                break
        self._again(later)
        return batch

    async def _look_up(self, suspects: list[Append]) -> dict[Key, Record]:
        """Find which messages of these items are stored; answer those items that are stored whole. Returns their sessions."""
        if not suspects:
            return {}
        rows = await self._database.fetch_once(sql.LOOK_UP, *sql.look_up_arguments(suspects))
        stored = {(row["user_id"], row["session_id"], row["id"]): row for row in rows}
        for item in suspects:
            item.check = False
            note_replays(item, stored)
        return {(row["user_id"], row["session_id"]): row for row in rows}

    async def _store(self, batch: list[Append]) -> None:
        """Run the statement for a batch, answer its items, and see to those that it left out."""
        if not batch:
            return
        arguments = sql.append_arguments(batch, LOCK_TIMEOUT)
        for item in batch:
            item.tries += 1
        try:
            rows = await self._database.fetch_once(self._appender.statement, *arguments)
        except DATABASE_ERRORS as error:
            if classify(error) is Failure.LOST:
                for item in batch:
                    item.attempted = True
            raise
        answers = {(row["user_id"], row["session_id"]): row for row in rows}
        left_out: list[Append] = []
        ends = {key: row["last_seq"] for key, row in answers.items()}
        # Backwards: the last item of a session ends at its last_seq.
        for item in reversed(sql.in_order(batch)):
            row = answers.get(item.key)
            if row is None:
                left_out.append(item)
                continue
            end = ends[item.key]
            start = ends[item.key] = end - len(item.pending)
            created = row["created"] and start == 0
            at = row["at"]
            item.finish(
                (Entry(m.id, start + n, at, False) for n, m in enumerate(item.pending, 1)),
                created=created,
            )
        for user_id, session_id in answers:
            self._appender.on_appended(user_id, session_id)
        if left_out:
            await self._explain(left_out[::-1])

    async def _explain(self, left_out: list[Append]) -> None:
        """Answer items whose session was missing, archived or not at the expected place: in the contract's order of checks."""
        try:
            sessions = await self._look_up(left_out)
        except DATABASE_ERRORS as error:
            await self._recover(left_out, error)
            return
        again: list[Append] = []
        for item in left_out:
            if item.future.done():
                continue
            item.lost_races += 1
            refusal = refusal_of(item, sessions.get(item.key))
            if refusal is not None:
                item.fail(refusal)
            elif item.lost_races >= MAX_LOST_RACES:
                item.fail(
                    Conflict(
                        "the session changes too fast; try again",
                        session_id=item.key[1],
                        retry_after=0.1,
                    )
                )
            else:
                again.append(item)
        self._again(again)

    async def _recover(self, batch: list[Append], error: BaseException) -> None:
        """Put the items of a failed statement where they can succeed, or answer them with the error."""
        batch = [item for item in batch if not item.future.done()]
        failed = recovery.FailedBatch(
            classify(error),
            sqlstate(error),
            constraint(error),
            item_count=len(batch),
            session_count=len({item.key for item in batch}),
            attempts=max((item.tries for item in batch), default=0),
            is_apart=self._key is not None,
        )
        await self._execute(recovery.decide(failed), batch, error)

    async def _execute(self, action: Action, batch: list[Append], error: BaseException) -> None:
        match action:
            case Action.NOTHING:
                await asyncio.sleep(0)
            case Action.WAIT_FOR_DATABASE:
                await self._wait_for_database(batch, error)
            case Action.LOOK_UP:
                self._again(batch, check=True)
            case Action.RETRY:
                await self._retry(batch, error)
            case Action.LOOK_UP_AND_RETRY:
                await self._retry(batch, error, check=True)
            case Action.RUN_SESSIONS_APART:
                self._appender.run_apart(batch)
            case Action.RUN_ITEMS_ALONE:
                self._again(batch, run_alone=True)
            case Action.FAIL:
                for item in batch:
                    item.fail(final_error(item.key[0], error))

    async def _wait_for_database(self, batch: list[Append], error: BaseException) -> None:
        """Keep a batch until the database is back; the message ids tell then whether it was stored before it went."""
        self._database.on_suspected_outage()
        self._again(batch, check=True)
        ask_at = self._loop.time() + backoff(self._outages)
        self._outages += 1
        while True:
            now = self._loop.time()
            for item in self.queue:
                if now >= item.give_up:
                    item.fail(
                        to_service_error(error) or Unavailable("the database does not answer")
                    )
            waiting = [item.give_up for item in self.queue if not item.future.done()]
            if now >= ask_at or not waiting:
                return
            await asyncio.sleep(min(ask_at, *waiting) - now)

    async def _retry(
        self, batch: list[Append], error: BaseException, *, check: bool = False
    ) -> None:
        now = self._loop.time()
        for item in batch:
            item.lost_races += sqlstate(error) != LOCK_NOT_AVAILABLE
            if item.lost_races >= MAX_LOST_RACES or now >= item.give_up:
                item.fail(final_error(item.key[0], error))
        self._again([item for item in batch if not item.future.done()], check=check)
        await asyncio.sleep(backoff(batch[0].tries, base_s=0.002, cap_s=0.05))

    def _again(self, batch: list[Append], *, check: bool = False, run_alone: bool = False) -> None:
        """Put items back at the head of the queue, in order, marked to be looked up first or to run alone."""
        if check or run_alone:
            for item in batch:
                item.check |= check
                item.run_alone |= run_alone
        self.queue.extendleft(reversed(batch))


def _collides(group: list[Append], item: Append) -> bool:
    """Whether an item cannot share a statement with others of its session: it would fail, or make them fail."""
    if item.is_conditional or any(other.is_conditional or other.run_alone for other in group):
        return True
    ids = {message.id for other in group for message in other.pending}
    if any(message.id in ids for message in item.pending):
        item.check = True
        return True
    return False
