"""A short soak, which `make soak` runs for minutes or hours, and its check of memory growth."""

from __future__ import annotations

import math
from operator import attrgetter
from pathlib import Path

import pytest
from rich.console import Console

from tests.soak.report import save, show
from tests.soak.run import Soak, check_logs
from tests.soak.stack import Stack
from tests.soak.tally import Sample, growth

ROUNDS = 3


@pytest.mark.faults
@pytest.mark.case(n=25)
@pytest.mark.timeout(900)
async def test_mixed_load_under_faults_of_every_kind_has_no_problems(tmp_path: Path) -> None:
    async with Stack() as stack:
        soak = Soak(stack, seed=25, on_status=lambda _status: None, pause_s=(0, 0.3))
        await soak.run(ROUNDS, faults=math.ceil(len(soak.faults.kinds) / ROUNDS))
        await soak.idle(minutes=0.05)
        await check_logs(stack, soak.tally)
    tally = soak.tally
    show(tally, Console(width=140))
    save(tally, tmp_path, seed=25)
    assert tally.problems == []
    assert tally.acknowledged > 1000
    assert tally.checked >= tally.acknowledged
    assert tally.library_calls > 0
    assert tally.cancelled > 0
    assert tally.documents > 0
    assert {outage.kind for outage in tally.outages} == set(soak.faults.kinds)
    assert tally.idle_statements == 0
    assert names_in(tmp_path) == {"report.json", "memory.svg"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def samples(*levels: float) -> list[Sample]:
    return [Sample(n, "one", 1, mib, 0, at_rest=True) for n, mib in enumerate(levels)]


def test_growth_distinguishes_growing_memory_from_stable_memory() -> None:
    assert growth(samples(80, 100, 101, 99, 100, 102, 100)) == pytest.approx(0.5)
    assert growth(samples(80, 100, 110, 120, 130, 140, 150)) == pytest.approx(40)
    assert growth(samples(80, 100)) is None


def test_growth_of_descriptors_is_found() -> None:
    taken = [Sample(n, "one", 1, 100, 0, at_rest=True, descriptors=30 + 5 * n) for n in range(7)]
    assert growth(taken, attrgetter("descriptors")) == pytest.approx(20)
    assert growth(taken) == 0
