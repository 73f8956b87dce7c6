"""Batches appends: those that arrive during a statement share the next one (group commit).

A *lane* runs one statement at a time. An append that arrives alone is sent immediately; those that
arrive while its statement is in flight are sent together in the next one. Sessions are assigned to
lanes by a hash, so that two lanes of a process never wait for the same session.

A session *runs apart*, in a lane of its own, while its row is locked or a large item is in its
queue. Others then wait for neither. It also runs apart for some seconds after it was deleted here,
or after another writer has delayed its user again (`contention.py`). If the queue of a lane exceeds
one batch, users take turns.

`lane.py` says why this is correct with any number of writers and replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from service.store.append import sql
from service.store.append.contention import Contention
from service.store.append.lane import Lane
from service.store.append.request import Append, Appended, Key
from service.store.db.database import Database
from service.store.db.fair_semaphore import FairSemaphore
from service.store.session_tombstones import TombstonePurger

MAX_APART_STATEMENTS = 4
"""Concurrent statements of sessions that run apart, except those with a large item."""
MAX_APART_STATEMENTS_PER_USER = 2
"""Those of one user, whose sessions may all be locked."""
MAX_LARGE_STATEMENTS = 1
"""Concurrent statements with a large item."""


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
        self._lanes = [Lane(self) for _ in range(lanes)]
        self._apart: dict[Key, Lane] = {}
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
                lane = self._apart[item.key] = Lane(self, item.key)
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
