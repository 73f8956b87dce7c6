"""Ids for new resources.

They are created before the first attempt of a call, so every retry sends the same id and nothing is
stored twice.
"""

from __future__ import annotations

import os
import time
import uuid


def new_id() -> str:
    """Return a new UUID of version 7, which sorts by its time of creation.

    >>> uuid.UUID(new_id()).version
    7
    """
    milliseconds = time.time_ns() // 1_000_000
    value = milliseconds << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 7 << 76  # version
    value = value & ~(0b11 << 62) | 0b10 << 62  # variant
    return str(uuid.UUID(int=value))
