"""`QueryQueue`: admits queries to the index and the embeddings, bounded and fair between users.

Neither the search process nor a remote endpoint may receive more queries than it can answer: they
would compute queries whose callers no longer wait. So queries wait here, where a cancelled one
costs nothing, and the queue rejects those that it has no room for.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from service.errors import Overloaded

MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 0.5, 4.0
"""Bounds of the back-off of rejected callers before jitter. It grows with the queue's length."""


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """The limits of a queue. Each limit of a user leaves room for others."""

    max_running: int
    max_running_per_user: int
    max_waiting: int = 64
    max_waiting_per_user: int = 16
    max_waiting_bytes: int = 16 * 1024 * 1024
    max_waiting_bytes_per_user: int = 4 * 1024 * 1024


SEARCH_PROCESS_LIMITS = QueryLimits(max_running=3, max_running_per_user=2)
"""The search process computes one request at a time. The others are the next ones, so that it does
not idle while a reply is read."""
REMOTE_LIMITS = QueryLimits(max_running=8, max_running_per_user=4)
"""A remote index or remote embeddings work concurrently. If they do not reply, they hold at most
these queries, for `CHAT_HISTORY_SEARCH_TIMEOUT`."""


@dataclass(eq=False, slots=True)
class _WaitingQuery:
    admitted: asyncio.Future[None]
    n_bytes: int
    has_started: bool


class QueryQueue:
    """Admits users in rotation, and the queries of one user in order of arrival."""

    def __init__(self, limits: QueryLimits) -> None:
        self.limits = limits
        self.waiting_count = 0
        self.rejected_count = 0
        """Queries that were rejected since the start, or waited until their time was up."""
        self._running: Counter[str] = Counter()
        self._running_count = 0
        self._queues: OrderedDict[str, deque[_WaitingQuery]] = OrderedDict()
        """The waiting queries of each user; the user in front is next."""
        self._waiting_bytes = 0

    @asynccontextmanager
    async def admitted(
        self, owner_id: str, n_bytes: int, timeout_at: float, *, has_started: bool = False
    ) -> AsyncIterator[None]:
        """Admit a query for the duration of a block.

        Args:
            owner_id: The user in whose queue the query waits.
            n_bytes: Bytes that the query holds while it waits.
            timeout_at: When to stop waiting, on the event loop's clock.
            has_started: Whether an earlier step of the query is done. It precedes the user's other
                queries and does not count against the limits of waiting queries, so that the work
                of the earlier step is not lost.

        Raises:
            Overloaded: the queue is full, or the query was not admitted in time.
        """
        limits = self.limits
        if (
            self._running_count < limits.max_running
            and self._running[owner_id] < limits.max_running_per_user
        ):
            # No query that could be admitted is waiting: `_admit_next` runs whenever a query ends.
            self._start(owner_id)
        else:
            await self._wait(owner_id, n_bytes, timeout_at, has_started=has_started)
        try:
            yield
        finally:
            self._end(owner_id)

    async def _wait(
        self, owner_id: str, n_bytes: int, timeout_at: float, *, has_started: bool
    ) -> None:
        queue = self._queues.setdefault(owner_id, deque())
        if not self._has_room(queue, n_bytes, has_started=has_started):
            self._drop_if_empty(owner_id, queue)
            raise self._overloaded()
        query = _WaitingQuery(asyncio.get_running_loop().create_future(), n_bytes, has_started)
        if has_started:
            queue.appendleft(query)
        else:
            queue.append(query)
        self.waiting_count += 1
        self._waiting_bytes += n_bytes
        try:
            async with asyncio.timeout_at(timeout_at):
                await query.admitted
        except BaseException as error:
            if not query.admitted.cancelled():
                self._end(owner_id)  # It had been admitted already.
            elif query in queue:
                queue.remove(query)
                self._drop_if_empty(owner_id, queue)
                self._forget(query)
            if isinstance(error, TimeoutError):
                raise self._overloaded() from None
            raise

    def _has_room(self, queue: deque[_WaitingQuery], n_bytes: int, *, has_started: bool) -> bool:
        limits = self.limits
        if not has_started:
            waiting_count = sum(not query.has_started for query in queue)
            if (
                waiting_count >= limits.max_waiting_per_user
                or self.waiting_count >= limits.max_waiting
            ):
                return False
        user_bytes = n_bytes + sum(query.n_bytes for query in queue)
        return (
            user_bytes <= limits.max_waiting_bytes_per_user
            and self._waiting_bytes + n_bytes <= limits.max_waiting_bytes
        )

    def _overloaded(self) -> Overloaded:
        self.rejected_count += 1
        share = min(1.0, self.waiting_count / self.limits.max_waiting)
        delay_s = MIN_RETRY_AFTER_S + share * (MAX_RETRY_AFTER_S - MIN_RETRY_AFTER_S)
        return Overloaded(
            "too many searches are waiting on this server; retry after the given delay",
            retry_after=delay_s * random.uniform(0.5, 1.5),  # noqa: S311 - not a secret
        )

    def _start(self, owner_id: str) -> None:
        self._running[owner_id] += 1
        self._running_count += 1

    def _end(self, owner_id: str) -> None:
        self._running_count -= 1
        self._running[owner_id] -= 1
        if not self._running[owner_id]:
            del self._running[owner_id]
        self._admit_next()

    def _admit_next(self) -> None:
        """Admit the next query of the first user in the rotation who is below the limit."""
        if self._running_count >= self.limits.max_running:
            return
        for owner_id in list(self._queues):
            if self._running[owner_id] >= self.limits.max_running_per_user:
                continue
            query = self._pop(owner_id)
            if query is not None:
                self._start(owner_id)
                query.admitted.set_result(None)
                return

    def _pop(self, owner_id: str) -> _WaitingQuery | None:
        """Remove a user's next query, and move the user to the end of the rotation."""
        queue = self._queues.pop(owner_id)
        while queue:
            query = queue.popleft()
            self._forget(query)
            if not query.admitted.done():  # Else it was cancelled at this moment.
                if queue:
                    self._queues[owner_id] = queue
                return query
        return None

    def _forget(self, query: _WaitingQuery) -> None:
        self.waiting_count -= 1
        self._waiting_bytes -= query.n_bytes

    def _drop_if_empty(self, owner_id: str, queue: deque[_WaitingQuery]) -> None:
        if not queue and self._queues.get(owner_id) is queue:
            del self._queues[owner_id]
