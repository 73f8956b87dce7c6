"""So many at once, and in turn: whoever floods waits behind themselves, and not everybody behind them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class NoTurn(TimeoutError):
    """There was no permit for as long as one could wait."""


class Permits:
    """`count` permits. Those who wait get them user by user, one each in turn, and each user's in the order in which they came."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = count
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._loop = asyncio.get_running_loop()

    @asynccontextmanager
    async def one(self, whose: str, patience: float) -> AsyncIterator[None]:
        """Hold a permit for a block.

        Args:
            whose: The user for whom it is.
            patience: Seconds to wait for one at the most.

        Raises:
            NoTurn: there was none in that time.
        """
        if self.free:
            self.free -= 1
        else:
            await self._turn(whose, patience)
        try:
            yield
        finally:
            self._pass_on()

    async def _turn(self, whose: str, patience: float) -> None:
        turn = self._loop.create_future()
        self._waiting.setdefault(whose, deque()).append(turn)
        try:
            async with asyncio.timeout(patience):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._pass_on()  # It was ours already.
            if isinstance(error, TimeoutError):
                raise NoTurn from None
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            whose, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[whose] = turns
            if not turn.done():  # Else nobody waits for it any more.
                turn.set_result(None)
                return
        self.free += 1
