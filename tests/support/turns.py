"""A counter of the event loop's turns, to test that work is spread over several of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class TurnCounter:
    """Counts the turns of the running loop.

    Two callbacks that see the same count ran in one turn or in two consecutive ones: before or
    after the counter's own callback. Three of them ran in two turns at least.
    """

    def __init__(self) -> None:
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._next)

    def _next(self) -> None:
        self.count += 1
        self._handle = self._loop.call_soon(self._next)

    def stop(self) -> None:
        self._handle.cancel()


@asynccontextmanager
async def counted_turns() -> AsyncGenerator[TurnCounter]:
    """Count the loop's turns during a block."""
    counter = TurnCounter()
    try:
        yield counter
    finally:
        counter.stop()
