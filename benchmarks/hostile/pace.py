"""A rate that the loops of an attack share."""

from __future__ import annotations

import asyncio
import time

_MAX_LAG_S = 0.1
"""Time by which an attack may be late and still make up for it."""


class Pace:
    """Spaces events evenly."""

    def __init__(self, per_second: float) -> None:
        """Set the rate."""
        self._interval_s = 1 / per_second
        self._next_at = 0.0

    async def wait(self, count: int = 1) -> None:
        """Wait for the turn of this many events, after those that other loops wait for."""
        now = time.monotonic()
        starts_at = max(self._next_at, now - _MAX_LAG_S)
        self._next_at = starts_at + count * self._interval_s
        await asyncio.sleep(max(starts_at - now, 0.0))
