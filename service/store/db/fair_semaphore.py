"""A semaphore that is fair between users: a burst of one user queues behind itself only."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class AcquireTimeout(TimeoutError):
    """No permit became free within the timeout."""


class FairSemaphore:
    """Grants permits to owners in rotation, and to the calls of one owner in order of arrival."""

    def __init__(self, permit_count: int) -> None:
        self.permit_count = permit_count
        self.free_count = permit_count
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """The waiting calls of each owner; the owner in front is next."""
        self._loop = asyncio.get_running_loop()

    @asynccontextmanager
    async def hold(self, owner_id: str, timeout_s: float) -> AsyncIterator[None]:
        """Hold a permit during the block.

        Args:
            owner_id: The user in whose queue the call waits.
            timeout_s: Seconds to wait for a permit.

        Raises:
            AcquireTimeout: no permit became free in that time.
        """
        if self.free_count:
            self.free_count -= 1
        else:
            await self._wait_for_permit(owner_id, timeout_s)
        try:
            yield
        finally:
            self._release()

    async def _wait_for_permit(self, owner_id: str, timeout_s: float) -> None:
        permit = self._loop.create_future()
        self._queues.setdefault(owner_id, deque()).append(permit)
        try:
            async with asyncio.timeout(timeout_s):
                await permit
        except BaseException as error:
            if permit.done() and not permit.cancelled():
                self._release()  # It had been granted already.
            if isinstance(error, TimeoutError):
                raise AcquireTimeout from None
            raise

    def _release(self) -> None:
        """Grant the permit to the next call that still waits, or count it as free."""
        while self._queues:
            owner_id, queue = self._queues.popitem(last=False)
            permit = queue.popleft()
            if queue:
                self._queues[owner_id] = queue
            if not permit.done():
                permit.set_result(None)
                return
        self.free_count += 1
