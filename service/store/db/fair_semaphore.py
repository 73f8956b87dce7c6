"""A semaphore that is fair between users: a burst of one user queues behind itself only."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class AcquireTimeout(TimeoutError):
    """No permit became free within the timeout."""

    def __init__(self, *, is_busy: bool) -> None:
        super().__init__()
        self.is_busy = is_busy
        """Whether other calls got permits in that time, so that the holders are not stuck."""


class QueueFull(Exception):
    """As many calls wait for a permit as may wait."""


class FairSemaphore:
    """Grants permits to owners in rotation, and to the calls of one owner in order of arrival."""

    def __init__(
        self,
        permit_count: int,
        *,
        max_held_per_owner: int | None = None,
        max_waiting_per_owner: int | None = None,
        max_waiting: int | None = None,
    ) -> None:
        """Set the limits; None is no limit.

        Args:
            permit_count: Number of permits.
            max_held_per_owner: Permits that one owner may hold, although others are free.
            max_waiting_per_owner: Calls of one owner that may wait.
            max_waiting: Calls of all owners that may wait.
        """
        self.permit_count = permit_count
        self.free_count = permit_count
        self.waiting_count = 0
        self._granted_count = 0
        self._max_held_per_owner = max_held_per_owner
        self._max_waiting_per_owner = max_waiting_per_owner
        self._max_waiting = max_waiting
        self._held: Counter[str] = Counter()
        """Permits that each owner holds; counted only if they are limited."""
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """The waiting calls of each owner; the owner in front is next."""
        self._loop = asyncio.get_running_loop()

    @asynccontextmanager
    async def hold(self, owner_id: str, timeout_s: float | None) -> AsyncIterator[None]:
        """Hold a permit during the block.

        Args:
            owner_id: The user in whose queue the call waits.
            timeout_s: Seconds to wait for a permit; None waits without a limit.

        Raises:
            AcquireTimeout: no permit became free in that time.
            QueueFull: too many calls wait already.
        """
        if self.free_count and self._may_hold_another(owner_id):
            self._take(owner_id)
        else:
            await self._wait_for_permit(owner_id, timeout_s)
        try:
            yield
        finally:
            self._release(owner_id)

    def _may_hold_another(self, owner_id: str) -> bool:
        limit = self._max_held_per_owner
        return limit is None or self._held[owner_id] < limit

    def _take(self, owner_id: str) -> None:
        self.free_count -= 1
        self._granted_count += 1
        if self._max_held_per_owner is not None:
            self._held[owner_id] += 1

    async def _wait_for_permit(self, owner_id: str, timeout_s: float | None) -> None:
        permit = self._loop.create_future()
        self._enqueue(owner_id, permit)
        granted_count = self._granted_count
        try:
            async with asyncio.timeout(timeout_s):
                await permit
        except BaseException as error:
            if permit.done() and not permit.cancelled():
                self._release(owner_id)  # It had been granted already.
            else:
                self._remove(owner_id, permit)
            if isinstance(error, TimeoutError):
                is_busy = self._granted_count > granted_count
                raise AcquireTimeout(is_busy=is_busy) from None
            raise

    def _enqueue(self, owner_id: str, permit: asyncio.Future[None]) -> None:
        if self._max_waiting is not None and self.waiting_count >= self._max_waiting:
            raise QueueFull
        queue = self._queues.get(owner_id)
        if queue is None:
            queue = self._queues[owner_id] = deque()
        elif self._max_waiting_per_owner is not None and len(queue) >= self._max_waiting_per_owner:
            raise QueueFull
        queue.append(permit)
        self.waiting_count += 1

    def _remove(self, owner_id: str, permit: asyncio.Future[None]) -> None:
        """Remove a call that no longer waits, unless `_grant_free` has dropped it already."""
        queue = self._queues.get(owner_id)
        if queue is None or permit not in queue:
            return
        queue.remove(permit)
        self.waiting_count -= 1
        if not queue:
            del self._queues[owner_id]

    def _release(self, owner_id: str) -> None:
        self.free_count += 1
        if self._max_held_per_owner is not None:
            self._held[owner_id] -= 1
            if not self._held[owner_id]:
                del self._held[owner_id]
        self._grant_free()

    def _grant_free(self) -> None:
        """Grant the free permits to the calls in line, except of owners at their limit."""
        while self.free_count:
            owner_id = next(filter(self._may_hold_another, self._queues), None)
            if owner_id is None:
                return
            queue = self._queues.pop(owner_id)
            permit = queue.popleft()
            self.waiting_count -= 1
            if queue:
                self._queues[owner_id] = queue  # At the end: the other owners are next.
            if not permit.done():
                self._take(owner_id)
                permit.set_result(None)
