"""Remembers which sessions and users other writers contend with, so that they run apart."""

from __future__ import annotations

import asyncio
from itertools import takewhile

from service.store.append.request import Key

CONTENTION_S = 5.0
"""Seconds for which a session or a user counts as contended after the last sign of it."""


class Contention:
    """Sessions that are being deleted, and users whose sessions were locked, in the last seconds.

    A shared statement waits for the locks of all its sessions. Appends that will probably wait must
    therefore not share it, as each of them would delay every user in the batch.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ends: dict[Key | str, float] = {}
        """The end of each session's or user's time, in ascending order."""

    def add_session(self, key: Key) -> None:
        """Record that a session is about to be locked for long, as by a deletion."""
        self._add(key)

    def add_user(self, user_id: str) -> None:
        """Record that appends of a user were delayed by another writer.

        All sessions of the user count: an attack may use another one each time.
        """
        self._add(user_id)

    def _add(self, entry: Key | str) -> None:
        now = self._loop.time()
        self._ends.pop(entry, None)
        self._ends[entry] = now + CONTENTION_S
        for expired in list(takewhile(lambda other: self._ends[other] <= now, self._ends)):
            del self._ends[expired]

    def covers(self, key: Key) -> bool:
        """Return whether a session, or its user, is contended."""
        if not self._ends:
            return False
        now = self._loop.time()
        return self._ends.get(key, now) > now or self._ends.get(key[0], now) > now

    def __len__(self) -> int:
        """Return the number of entries, some of which may have expired."""
        return len(self._ends)
