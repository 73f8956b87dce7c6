"""The pause before a search process that has died is started again."""

from __future__ import annotations

BASE_S, CAP_S = 0.25, 2.0
"""First and longest pause. A start uses about a second of processor time, and a query that waits
for it must still be answered before its timeout."""
STABLE_AFTER_S = 30.0
"""A process that ran for longer had a stable start: its death is the first one again."""


def delay_s(quick_death_count: int) -> float:
    """Return the seconds to wait after a number of deaths in a row, each soon after its start.

    The first restart is immediate, since the death may be an accident.
    """
    if quick_death_count <= 1:
        return 0.0
    return min(CAP_S, BASE_S * 2.0 ** min(quick_death_count - 2, 10))
