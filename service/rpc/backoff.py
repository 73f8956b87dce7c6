"""Chooses how long rejected callers wait before they retry."""

from __future__ import annotations

import random
import time

FREQUENT_REJECTIONS_PER_S = 200
"""Above this rate of rejections, rejected callers are asked to back off longer."""
MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 0.25, 8.0
"""Bounds of the back-off before jitter, which changes it by up to a half."""


class RejectionBackoff:
    """Chooses the back-off of rejected callers.

    A rejection costs nearly as much as a call, so the delay doubles while rejections are frequent.
    """

    def __init__(self) -> None:
        self._delay_s = MIN_RETRY_AFTER_S
        self._second_started_at = 0.0
        self._count = 0

    def next_delay_s(self) -> float:
        """Count a rejection; return the delay in seconds, with jitter to spread the retries."""
        now = time.monotonic()
        elapsed_s = now - self._second_started_at
        if elapsed_s >= 1:
            if self._count > FREQUENT_REJECTIONS_PER_S and elapsed_s < MAX_RETRY_AFTER_S:
                self._delay_s = min(self._delay_s * 2, MAX_RETRY_AFTER_S)
            elif self._count < FREQUENT_REJECTIONS_PER_S / 2 or elapsed_s >= MAX_RETRY_AFTER_S:
                self._delay_s = max(self._delay_s / 2, MIN_RETRY_AFTER_S)
            self._second_started_at, self._count = now, 0
        self._count += 1
        return self._delay_s * random.uniform(0.5, 1.5)  # noqa: S311 - no secret depends on it
