"""When the data of a replica is fresh enough: by the counter of the epoch, and no other clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from service.store.history_mark import Mark
from service.store.lag_gate import LagGate, ReplicaBehind

BOUND_S = 16.0
EPOCH, OTHER_EPOCH = "epoch", "other epoch"


class Keeper:
    """Replaces the `EpochKeeper` of the primary."""

    def __init__(self) -> None:
        self.mark: Mark | None = None
        self.on_raised: Any = None
        self.on_restored: list[Any] = []
        self.request_count = 0

    def raise_soon(self) -> None:
        self.request_count += 1


class Replica:
    """A gate, its clock, and what the replica shows."""

    def __init__(self) -> None:
        self.keeper = Keeper()
        self.gate = LagGate(self.keeper, BOUND_S)  # type: ignore[arg-type]
        self.now = 1000.0
        self.gate._loop = self  # type: ignore[assignment]
        self.row: Any = None

    def time(self) -> float:
        return self.now

    def store(self, counter: int, at: float, epoch: str = EPOCH) -> None:
        """Let the primary store a mark."""
        self.keeper.mark = Mark(epoch, counter)
        self.keeper.on_raised(self.keeper.mark, at)

    def show(self, counter: int, epoch: str = EPOCH) -> None:
        """Let the replica show a mark."""
        self.row = SimpleNamespace(epoch=epoch, counter=counter)

    async def execute(self, _statement: Any) -> Any:
        return SimpleNamespace(one_or_none=lambda: self.row)

    async def is_fresh(self) -> bool:
        try:
            await self.gate.check(self)  # type: ignore[arg-type]
        except ReplicaBehind:
            return False
        return True


@pytest.fixture
async def replica() -> Replica:
    return Replica()


async def test_nothing_is_known_before_the_first_mark(replica: Replica) -> None:
    replica.show(10**9)
    assert not await replica.is_fresh()
    assert replica.keeper.request_count == 1


async def test_replica_is_fresh_for_the_bound_behind_the_mark_that_it_shows(
    replica: Replica,
) -> None:
    replica.store(7, at=1000.0)
    replica.show(7)
    replica.now = 1000.0 + BOUND_S
    assert await replica.is_fresh()
    replica.now += 0.001
    assert not await replica.is_fresh()


async def test_replica_that_shows_an_older_mark_is_as_old_as_that(replica: Replica) -> None:
    replica.store(7, at=1000.0)
    replica.store(8, at=1010.0)
    replica.show(7)
    replica.now = 1012.0
    assert await replica.is_fresh()
    assert replica.gate.lag_s == 2.0, "it lacks what was stored at 1010"
    replica.now = 1000.0 + BOUND_S + 1
    assert not await replica.is_fresh()
    replica.show(8)
    assert await replica.is_fresh()
    assert replica.gate.lag_s == 0.0


async def test_counter_of_another_process_counts(replica: Replica) -> None:
    """It raises the same counter, later than this process has."""
    replica.store(7, at=1000.0)
    replica.show(9)
    assert await replica.is_fresh()


async def test_replica_that_shows_no_remembered_mark_is_not_used(replica: Replica) -> None:
    replica.store(7, at=1000.0)
    replica.show(6)
    assert not await replica.is_fresh()


@pytest.mark.parametrize("row", [None, SimpleNamespace(epoch=OTHER_EPOCH, counter=10**9)])
async def test_replica_of_another_history_is_not_used(replica: Replica, row: Any) -> None:
    replica.store(7, at=1000.0)
    replica.row = row
    assert not await replica.is_fresh()


async def test_marks_of_the_history_before_a_restore_are_forgotten(replica: Replica) -> None:
    replica.store(7, at=1000.0)
    replica.keeper.mark = Mark(OTHER_EPOCH, 10**6)
    for callback in replica.keeper.on_restored:
        callback()
    replica.keeper.on_raised(Mark(EPOCH, 8), 1001.0)  # In flight until then.
    replica.show(10**6, OTHER_EPOCH)
    assert not await replica.is_fresh()
    replica.store(10**6 + 1, at=1002.0, epoch=OTHER_EPOCH)
    replica.show(10**6 + 1, OTHER_EPOCH)
    assert await replica.is_fresh()


async def test_marks_that_overlap_never_make_the_replica_look_newer(replica: Replica) -> None:
    replica.store(8, at=1005.0)
    # Stored before the mark 8 although it began later: its counter proves less than 8 does.
    replica.keeper.on_raised(Mark(EPOCH, 7), 1008.0)
    replica.show(7)
    replica.now = 1008.0
    assert not await replica.is_fresh()


async def test_frequent_marks_do_not_displace_those_of_the_bound(replica: Replica) -> None:
    for number in range(10_000):
        replica.store(number, at=1000.0 + number * BOUND_S / 10_000)
    replica.now = 1000.0 + BOUND_S
    replica.show(5_000)
    assert await replica.is_fresh()


async def test_marks_are_requested_at_intervals(replica: Replica) -> None:
    replica.show(0)
    for _ in range(100):
        await replica.is_fresh()
        replica.now += BOUND_S / 100
    assert replica.keeper.request_count == 4
    replica.store(1, at=replica.now)
    await replica.is_fresh()
    assert replica.keeper.request_count == 4
