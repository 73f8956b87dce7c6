"""Decides how long a batch stays open for more calls before its statement is sent.

The cost of a statement hardly grows with the calls in it. Under load, however, few calls are ready
at any one moment: most are still on their way through gRPC and the event loop, and a statement that
is sent as soon as possible carries two or three. The batch therefore stays open while turns of the
event loop keep bringing more. An idle loop turns in microseconds, a busy one takes as long as its
work: counting turns distinguishes the two without a timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized

QUIET_TURNS_PER_CALL = 8
"""Turns of the event loop without a new call after which a batch is closed, for each call in the
previous batch."""
MAX_QUIET_TURNS = 100
"""Upper limit of these turns, however large the previous batch was."""
MAX_WAIT_S = 0.01
"""Seconds after which a batch is closed in any case."""


class BatchWindow:
    """Decides when the calls in a queue are sent as one batch."""

    __slots__ = ("_loop", "last_size")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.last_size = 1
        """Calls in the queue when the previous batch was closed."""

    async def wait(self, queue: Sized, max_size: int) -> None:
        """Return once the queue holds `max_size` calls, or no further call is expected soon.

        After a batch of one, a call that arrives alone waits for one turn of the event loop only.
        """
        quiet_limit = 1
        if self.last_size > 1:
            quiet_limit = min(MAX_QUIET_TURNS, QUIET_TURNS_PER_CALL * self.last_size)
        size = len(queue)
        quiet_turns = 0
        closes_at = self._loop.time() + MAX_WAIT_S
        while size < max_size and quiet_turns < quiet_limit and self._loop.time() < closes_at:
            await asyncio.sleep(0)
            new_size = len(queue)
            quiet_turns = 0 if new_size > size else quiet_turns + 1
            size = new_size
        self.last_size = size
