"""The pauses of the indexer, which depend on the number of cores."""

from __future__ import annotations

import os

import pytest

from service.search import pacing


def test_without_cpu_affinity_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")  # As on macOS.
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert pacing.usable_cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert pacing.usable_cores() == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no CPU affinity here")
def test_with_cpu_affinity_only_usable_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 3})
    assert pacing.usable_cores() == 2


def test_rest_grows_with_the_processor_time_of_the_batch() -> None:
    assert pacing.rest_s(duration_s=2.0, cpu_s=1.0, cores=2) == 0.0
    assert pacing.rest_s(duration_s=2.0, cpu_s=1.5, cores=2) == pytest.approx(3.0)
    assert pacing.rest_s(duration_s=2.0, cpu_s=2.0, cores=2) == pytest.approx(6.0)
    assert pacing.rest_s(duration_s=0.0, cpu_s=0.0, cores=2) == 0.0


def test_large_machine_does_not_rest() -> None:
    assert pacing.rest_s(duration_s=2.0, cpu_s=2.0, cores=4) == 0.0
