"""Pauses between the indexer's batches, so that indexing leaves small machines to chat."""

from __future__ import annotations

import os

REST_FACTOR = 3.0
"""Rest after a batch, as a multiple of its duration, while this process uses a whole core.

The factor falls linearly to 0 at half a core. At 3, a busy small machine indexes for a quarter of
the time, since the search process takes a core from chat.
"""
SMALL_MACHINE_CORES = 3
"""Maximum number of cores with which the indexer rests. With more, chat can spare one core."""


def usable_cores() -> int:
    """Return the number of cores that this process may use.

    Platforms without CPU affinity, such as macOS, have no `os.sched_getaffinity`.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def rest_s(duration_s: float, cpu_s: float, cores: int) -> float:
    """Return how long to rest after a batch, in seconds.

    Args:
        duration_s: Duration of the batch.
        cpu_s: Processor time that this process used during it.
        cores: Cores that this process may use.
    """
    if cores > SMALL_MACHINE_CORES or not duration_s:
        return 0.0
    return REST_FACTOR * duration_s * max(0.0, 2 * cpu_s / duration_s - 1)
