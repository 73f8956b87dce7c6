"""`Turns`: a lock for the search process, which computes one request at a time."""

from __future__ import annotations

import asyncio
from collections import deque

MAX_QUERIES_IN_ROW = 4
"""Queries that precede indexing while it waits. Then it has its turn, so that it never starves."""


class Turns:
    """Grants turns in order of arrival, to queries before indexing.

    The queue of queries is bounded by `QueryQueue`. Indexing has one request at a time for each of
    its few tasks.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._queries_in_row = 0
        self._queries: deque[asyncio.Future[None]] = deque()
        self._indexing: deque[asyncio.Future[None]] = deque()

    async def acquire(self, *, is_query: bool) -> None:
        """Wait for a turn; `release` must follow."""
        if not self._is_taken:
            self._is_taken = True
            return
        queue = self._queries if is_query else self._indexing
        turn = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.release()  # The turn had been granted already.
            elif turn in queue:
                queue.remove(turn)
            raise

    def release(self) -> None:
        """Grant the turn to the next request."""
        while turn := self._next():
            if not turn.done():
                turn.set_result(None)
                return
            # Else it was cancelled at this moment.
        self._is_taken = False

    def _next(self) -> asyncio.Future[None] | None:
        is_indexing_due = bool(self._indexing) and self._queries_in_row >= MAX_QUERIES_IN_ROW
        if self._queries and not is_indexing_due:
            self._queries_in_row += 1
            return self._queries.popleft()
        self._queries_in_row = 0
        return self._indexing.popleft() if self._indexing else None
