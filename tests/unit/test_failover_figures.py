"""The figures that the failover test takes from its clients and from health."""

from __future__ import annotations

import pytest

from tests.support.failover import Figures
from tests.support.failover_load import longest_error_s, longest_pause
from tests.support.record import Problem


@pytest.mark.parametrize(
    ("since", "until", "pause"),
    [
        (2.5, 9.0, (3.0, 9.0)),
        (2.5, 3.0, (2.0, 3.0)),
        # It began before the fault, and its end counts.
        (5.0, 9.0, (3.0, 9.0)),
        # Later pauses belong to other faults.
        (0.5, 2.0, (0.0, 1.5)),
        (9.5, 30.0, (9.0, 30.0)),
    ],
)
def test_longest_pause_is_that_of_one_fault(
    since: float, until: float, pause: tuple[float, float]
) -> None:
    assert longest_pause([0.0, 1.5, 2.0, 3.0, 9.0, 30.0], since, until) == pause


@pytest.mark.parametrize(
    ("changes", "error_s"),
    [
        # SERVING all the time.
        ([(0.0, True)], 6.0),
        # NOT_SERVING from 2 s after the start to 1 s after the end, and the other way round.
        ([(0.0, True), (12.0, False), (17.0, True)], 2.0),
        ([(0.0, True), (11.0, False), (20.0, True)], 4.0),
        # SERVING during the outage, and wrong about its end only.
        ([(0.0, True), (17.0, False), (18.0, True)], 6.0),
        # SERVING twice after the end: the last change counts.
        ([(0.0, True), (11.0, False), (17.0, True), (18.0, False), (24.0, True)], 8.0),
        # An earlier outage does not count.
        ([(0.0, True), (3.0, False), (4.0, True), (11.0, False), (16.5, True)], 1.0),
    ],
)
def test_health_is_wrong_at_the_start_or_after_the_end_of_an_outage(
    changes: list[tuple[float, bool]], error_s: float
) -> None:
    assert longest_error_s(changes, 10.0, 16.0) == error_s


def test_only_asynchronous_replication_may_lose_messages() -> None:
    kinds = ("LOST", "DOUBLED", "GAP", "MOVED", "TORN", "STRANGE", "ORDER", "VIEW", "STALE")
    problems = [Problem(kind, "") for kind in kinds]

    def defects(*, is_synchronous: bool) -> set[str]:
        figures = Figures([], 0, 0, problems, is_synchronous)
        return {problem.kind for problem in figures.defects}

    assert defects(is_synchronous=True) == set(kinds) - {"VIEW"}
    assert defects(is_synchronous=False) == set(kinds) - {"LOST", "VIEW", "STALE"}
