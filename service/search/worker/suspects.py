"""`Suspects`: the texts that were being computed when a search process died."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from typing import Any

MAX_DEATHS = 2
"""Deaths after which a text is blocked. The first one may be an accident, such as lack of memory
in which the kernel chose the search process."""
MAX_SUSPECTS = 1024
FORGET_AFTER_S = 600.0
"""Time after which a text may be tried again, so that two accidents do not condemn it for ever."""


class Suspects:
    """Counts the deaths for each text. It holds fingerprints, no text."""

    def __init__(self) -> None:
        self._deaths: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        """Number of deaths and time of the latest, by fingerprint; the oldest first."""

    def __len__(self) -> int:
        return len(self._deaths)

    def is_blocked(self, argument: Any) -> bool:
        """Return whether a text has caused MAX_DEATHS deaths."""
        if not self._deaths:
            return False
        fingerprint = _fingerprint(argument)
        count, died_at = self._deaths.get(fingerprint, (0, 0.0))
        if count and time.monotonic() - died_at > FORGET_AFTER_S:
            del self._deaths[fingerprint]
            return False
        return count >= MAX_DEATHS

    def record_death(self, argument: Any) -> None:
        """Count a death while a text was being computed."""
        fingerprint = _fingerprint(argument)
        count, _ = self._deaths.pop(fingerprint, (0, 0.0))
        self._deaths[fingerprint] = (count + 1, time.monotonic())
        if len(self._deaths) > MAX_SUSPECTS:
            self._deaths.popitem(last=False)

    def clear(self, argument: Any) -> None:
        """Forget a text that has been computed."""
        if self._deaths:
            self._deaths.pop(_fingerprint(argument), None)


def _fingerprint(argument: Any) -> bytes:
    return hashlib.sha256(json.dumps(argument).encode()).digest()
