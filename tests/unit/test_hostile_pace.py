"""The rate of the attacks of `make hostile` that are limited."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from benchmarks.hostile.pace import Pace


async def test_loops_share_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(round(delay_s, 6))

    monkeypatch.setattr("benchmarks.hostile.pace.time", SimpleNamespace(monotonic=lambda: 1000.0))
    monkeypatch.setattr("benchmarks.hostile.pace.asyncio", SimpleNamespace(sleep=sleep))
    shared = Pace(per_second=100)
    await asyncio.gather(*(shared.wait() for _ in range(3)), shared.wait(20), shared.wait())
    # An attack begins with the events of a tenth of a second.
    assert slept == [0.0, 0.0, 0.0, 0.0, 0.13]


async def test_late_loops_make_up_for_a_tenth_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(round(delay_s, 6))

    monkeypatch.setattr("benchmarks.hostile.pace.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("benchmarks.hostile.pace.asyncio", SimpleNamespace(sleep=sleep))
    shared = Pace(per_second=100)
    await shared.wait(20)
    await shared.wait()
    now += 5.0
    for _ in range(12):
        await shared.wait()
    assert slept[1] == 0.1
    assert slept[2:] == [0.0] * 11 + [0.01]
