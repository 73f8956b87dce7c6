"""So many at once, and in turn: whoever floods waits behind themselves, and not everybody behind them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class AcquireTimeout(TimeoutError):
    """There was no permit for as long as one could wait."""


class FairSemaphore:
    """`count` permits. Those who wait get them user by user, one each in turn, and each user's in the order in which they came."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = count
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._loop = asyncio.get_running_loop()

    @asynccontextmanager
    async def hold(self, owner_id: str, patience: float) -> AsyncIterator[None]:
        """Hold a permit for a block.

        Args:
            owner_id: The user for whom it is.
            patience: Seconds to wait for one at the most.

        Raises:
            AcquireTimeout: there was none in that time.
        """
        if self.free:
            self.free -= 1
        else:
            await self._turn(owner_id, patience)
        try:
            yield
        finally:
            self._pass_on()

    async def _turn(self, owner_id: str, patience: float) -> None:
        turn = self._loop.create_future()
        self._waiting.setdefault(owner_id, deque()).append(turn)
        try:
            async with asyncio.timeout(patience):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._pass_on()  # It was ours already.
            if isinstance(error, TimeoutError):
                raise AcquireTimeout from None
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            owner_id, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[owner_id] = turns
            if not turn.done():  # Else nobody waits for it any more.
                turn.set_result(None)
                return
        self.free += 1
