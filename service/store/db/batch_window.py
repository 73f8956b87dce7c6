"""How long a statement waits for more calls to share it.

The cost of a statement hardly grows with the calls in it, but under load few calls are ready at any one moment: most are still on
their way through gRPC and the event loop, and a statement that leaves as soon as it can takes two or three along. So it waits
for as long as turns of the loop keep bringing more. A loop with nothing to do turns in some microseconds, a busy one takes as
long as its work: counting turns tells the two apart without a timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized

MAX_QUIET_TURNS = 100
"""Turns of the event loop without anything new after which a statement leaves, at the most."""
QUIET_TURNS_PER_CALL = 8
"""The same, for each call that the last statement carried."""
MAX_WAIT_S = 0.01
"""Seconds after which a statement leaves in any case."""


class BatchWindow:
    """Decides when what waits in a queue leaves together."""

    __slots__ = ("_loop", "last")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.last = 1
        """How many there were the last time."""

    async def wait(self, queue: Sized, enough: int) -> None:
        """Return when there is enough, or no more to be expected soon: for a call that comes alone after another such, at the next turn."""
        patience = min(MAX_QUIET_TURNS, QUIET_TURNS_PER_CALL * self.last) if self.last > 1 else 1
        seen = len(queue)
        quiet = 0
        end = self._loop.time() + MAX_WAIT_S
        while seen < enough and quiet < patience and self._loop.time() < end:
            await asyncio.sleep(0)
            now = len(queue)
            quiet = 0 if now > seen else quiet + 1
            seen = now
        self.last = seen
