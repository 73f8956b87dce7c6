"""Wakes those who follow a session: at once after this process's own commits, and within half a second after anybody else's.

NOTIFY takes a global lock at commit and does not pass a transaction pooler, so the sessions that somebody follows are asked for their
`last_seq`, all of them in one statement, and only while somebody follows.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

import structlog

from service.store.db.database import DATABASE_ERRORS, Database
from service.store.db.hot_pool import Record, Statement

POLL_INTERVAL_S = 0.3
"""Between two looks at what other processes have appended."""

_SESSIONS = Statement.from_text("""
SELECT s.user_id::text, s.id::text AS session_id, s.last_seq, (date_part('epoch', s.created_at) * 1e6)::bigint AS session_created_us
FROM unnest($1::uuid[], $2::uuid[]) AS w (user_id, id)
JOIN chat_sessions AS s ON s.user_id = w.user_id AND s.id = w.id
""")

_log = structlog.get_logger(__name__)


class Watcher:
    """One follower of one session; a context manager that signs off at its end."""

    def __init__(
        self, hub: WatchHub, key: tuple[str, str], session_created_us: int, seq: int
    ) -> None:
        self._hub = hub
        self.key = key
        self.session_created_us = session_created_us
        """When the session was created: another one may be made with the same id."""
        self.known_seq = seq
        """The highest `last_seq` that this watcher was woken for."""
        self.session_deleted = False
        """Whether the session has been erased."""
        self._woken = asyncio.Event()

    def __enter__(self) -> Self:
        self._hub.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hub.remove(self)

    def arm(self) -> None:
        """Forget past wake-ups: call it before reading, so that nothing between the read and the wait is missed."""
        self._woken.clear()

    def wake(self) -> None:
        """Let `wait` return."""
        self._woken.set()

    async def wait(self, seconds: float | None) -> None:
        """Wait until the session may have changed, at most so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()


class WatchHub:
    """All followers in this process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._watchers: dict[tuple[str, str], set[Watcher]] = {}
        self._poller: asyncio.Task[None] | None = None
        self.is_closing = False
        """Whether the followers are being sent away."""

    def __len__(self) -> int:
        return sum(map(len, self._watchers.values()))

    def add(self, watcher: Watcher) -> None:
        """Sign a follower on."""
        self._watchers.setdefault(watcher.key, set()).add(watcher)
        if self._poller is None:
            self._poller = asyncio.get_running_loop().create_task(self._poll())

    def remove(self, watcher: Watcher) -> None:
        """Sign a follower off."""
        followers = self._watchers.get(watcher.key, set())
        followers.discard(watcher)
        if not followers:
            self._watchers.pop(watcher.key, None)
        if not self._watchers and self._poller is not None:
            self._poller.cancel()
            self._poller = None

    def session_changed(self, user_id: str, session_id: str) -> None:
        """Wake the followers of a session to which this process has appended."""
        for watcher in self._watchers.get((user_id, session_id), ()):
            watcher.wake()

    def session_deleted(self, user_id: str, session_id: str) -> None:
        """Tell the followers of a session that this process has erased."""
        for watcher in self._watchers.get((user_id, session_id), ()):
            watcher.session_deleted = True
            watcher.wake()

    def close(self) -> None:
        """Wake every follower to be sent away."""
        self.is_closing = True
        self._wake_all()

    def _wake_all(self) -> None:
        for followers in self._watchers.values():
            for watcher in followers:
                watcher.wake()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            keys = list(self._watchers)
            arguments = ([key[0] for key in keys], [key[1] for key in keys])
            try:
                rows = await self._database.fetch_once(_SESSIONS, *arguments)
            except DATABASE_ERRORS:
                # Each follower finds out by its own read, which retries, and ends its stream when that does not help.
                _log.warning("watch poll failed", watched_sessions=len(keys))
                self._database.on_suspected_outage()
                self._wake_all()
                continue
            found = {(row["user_id"], row["session_id"]): row for row in rows}
            for key in keys:
                self._notify(key, found.get(key))

    def _notify(self, key: tuple[str, str], session: Record | None) -> None:
        for watcher in self._watchers.get(key, ()):
            if session is None or session["session_created_us"] != watcher.session_created_us:
                watcher.session_deleted = True
                watcher.wake()
            elif session["last_seq"] > watcher.known_seq:
                watcher.known_seq = session["last_seq"]
                watcher.wake()
