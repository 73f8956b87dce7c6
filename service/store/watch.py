"""Wakes the watchers of a session after commits.

Commits of this process wake them immediately, and those of other processes within half a second,
by polling. NOTIFY would take a global lock at commit, and does not pass a transaction pooler. One
statement polls the `last_seq` of all watched sessions. While no session is watched, none is sent.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

import structlog

from service.store.db.database import Database
from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.hot_pool import Record, Statement
from service.store.epoch import EpochKeeper
from service.store.history_mark import Mark

POLL_INTERVAL_S = 0.3
"""Seconds between two polls for the appends of other processes."""

_LAST_SEQS = Statement.from_text("""
SELECT s.user_id::text, s.id::text AS session_id, s.last_seq,
       (date_part('epoch', s.created_at) * 1e6)::bigint AS session_created_us,
       e.epoch::text, e.counter
FROM unnest($1::uuid[], $2::uuid[]) AS w (user_id, id)
JOIN chathistory.chat_sessions AS s ON s.user_id = w.user_id AND s.id = w.id
LEFT JOIN chathistory.history_epoch AS e ON true
""")

_log = structlog.get_logger(__name__)


SessionKey = tuple[str, str]
"""A session: user id, session id."""


class Watcher:
    """A watcher of one session; a context manager that registers it with its hub."""

    def __init__(self, hub: WatchHub, key: SessionKey, session_created_us: int, seq: int) -> None:
        self._hub = hub
        self.key = key
        self.session_created_us = session_created_us
        """Creation time of the session: a session created later with its id is another one."""
        self.known_seq = seq
        """The latest `last_seq` for which a poll has woken this watcher."""
        self.session_deleted = False
        """True once the session was deleted: the stream must end."""
        self.history_restored = False
        """True once the database has gone back in time: the stream must end."""
        self._woken = asyncio.Event()

    def __enter__(self) -> Self:
        self._hub.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hub.remove(self)

    def arm(self) -> None:
        """Clear earlier wake-ups.

        Call it before reading messages, so that a commit between the read and `wait` is not missed.
        """
        self._woken.clear()

    def wake(self) -> None:
        """Let `wait` return."""
        self._woken.set()

    async def wait(self, timeout_s: float | None) -> None:
        """Wait until the session may have changed, at most `timeout_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()


class WatchHub:
    """All watchers of this process, and the task that polls for them."""

    def __init__(self, database: Database, epoch: EpochKeeper) -> None:
        self._database = database
        self._epoch = epoch
        epoch.on_restored.append(self._end_history)
        self._watchers: dict[SessionKey, set[Watcher]] = {}
        self._poller: asyncio.Task[None] | None = None
        self.is_closing = False
        """True once the server drains: the streams must end."""

    def __len__(self) -> int:
        return sum(map(len, self._watchers.values()))

    def add(self, watcher: Watcher) -> None:
        """Register a watcher; the first one starts the polling."""
        self._watchers.setdefault(watcher.key, set()).add(watcher)
        if self._poller is None:
            self._poller = asyncio.get_running_loop().create_task(self._poll())

    def remove(self, watcher: Watcher) -> None:
        """Unregister a watcher; the last one ends the polling."""
        watchers = self._watchers.get(watcher.key, set())
        watchers.discard(watcher)
        if not watchers:
            self._watchers.pop(watcher.key, None)
        if not self._watchers and self._poller is not None:
            self._poller.cancel()
            self._poller = None

    def session_changed(self, user_id: str, session_id: str) -> None:
        """Wake the watchers of a session to which this process has appended."""
        for watcher in self._watchers.get((user_id, session_id), ()):
            watcher.wake()

    def session_deleted(self, user_id: str, session_id: str) -> None:
        """End the watchers of a session that this process has deleted."""
        for watcher in self._watchers.get((user_id, session_id), ()):
            watcher.session_deleted = True
            watcher.wake()

    def close(self) -> None:
        """End all watchers."""
        self.is_closing = True
        self._wake_all()

    def _wake_all(self) -> None:
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.wake()

    def _end_history(self) -> None:
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.history_restored = True
        self._wake_all()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            try:
                await self._poll_once()
            except Exception as error:  # noqa: BLE001 - without polls no watcher would be woken
                # The watchers' own reads retry. Each watcher ends its stream if its read fails.
                _log.warning(
                    "watch poll failed",
                    watched_sessions=len(self._watchers),
                    error=type(error).__name__,
                )
                if isinstance(error, DATABASE_ERRORS):
                    self._database.retries.report(error)
                self._wake_all()

    async def _poll_once(self) -> None:
        keys = list(self._watchers)
        arguments = ([user_id for user_id, _ in keys], [session_id for _, session_id in keys])
        known_mark = self._epoch.mark
        records = await self._database.fetch_once(_LAST_SEQS, *arguments, is_reading=True)
        if records and records[0]["epoch"] is not None:
            stored_mark = Mark(records[0]["epoch"], records[0]["counter"])
            self._epoch.compare(stored_mark, known_mark)
        sessions = {(record["user_id"], record["session_id"]): record for record in records}
        for key in keys:
            self._notify(key, sessions.get(key))

    def _notify(self, key: SessionKey, session: Record | None) -> None:
        """Wake the watchers of a session that was deleted, or appended to, since the last poll.

        A `last_seq` that has fallen wakes them, too: their next read finds that history was lost.
        """
        for watcher in self._watchers.get(key, ()):
            if session is None or session["session_created_us"] != watcher.session_created_us:
                watcher.session_deleted = True
                watcher.wake()
            elif session["last_seq"] != watcher.known_seq:
                watcher.known_seq = session["last_seq"]
                watcher.wake()
