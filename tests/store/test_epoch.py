"""The epoch of the history: which process notices a restore, and what is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from service.store import epoch
from service.store.db.database import Database
from service.store.db.hot_pool import Record, Statement
from service.store.epoch import EpochKeeper
from service.store.history_mark import Mark
from tests.support.cluster import fetch
from tests.support.lost_history import set_counter, stored_epoch
from tests.support.servers import target_of

ENOUGH = 20.0
"""Seconds after which something that has not happened is not expected any more."""


class DelayingDatabase(Database):
    """A database whose results can be held back."""

    held_back: asyncio.Event | None = None
    has_result: asyncio.Event

    async def fetch_once(self, statement: Statement, *args: Any, **options: Any) -> list[Record]:
        event, self.held_back = self.held_back, None
        rows = await super().fetch_once(statement, *args, **options)
        if event is not None:
            self.has_result.set()
            await event.wait()
        return rows


@pytest.fixture
async def database(database_url: str) -> AsyncGenerator[DelayingDatabase]:
    database = DelayingDatabase(target_of(database_url))
    database.has_result = asyncio.Event()
    yield database
    await database.close()


@pytest.fixture
async def keeper(database: DelayingDatabase) -> EpochKeeper:
    return EpochKeeper(database)


def count_restores(keeper: EpochKeeper) -> list[Mark | None]:
    """Return a list to which each restore that the keeper notices adds the mark after it."""
    marks: list[Mark | None] = []
    keeper.on_restored.append(lambda: marks.append(keeper.mark))
    return marks


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(ENOUGH):
        while not condition():
            await asyncio.sleep(0.01)


async def test_each_raise_returns_a_greater_counter_of_the_same_epoch(
    keeper: EpochKeeper, database: Database, database_url: str
) -> None:
    first = await keeper.read()
    assert first == await stored_epoch(database_url)
    raised = [await keeper.raise_mark(), await EpochKeeper(database).raise_mark()]
    assert raised == [Mark(first.epoch, first.counter + 1), Mark(first.epoch, first.counter + 2)]
    assert await stored_epoch(database_url) == raised[-1]


async def test_lower_counter_begins_a_new_epoch(keeper: EpochKeeper, database_url: str) -> None:
    restores = count_restores(keeper)
    known = Mark("", 0)
    for _ in range(3):
        known = await keeper.raise_mark()
    await set_counter(database_url, known.counter - 1)
    declared = await keeper.read()
    assert declared.epoch != known.epoch
    assert declared.counter > known.counter
    assert declared == keeper.mark == await stored_epoch(database_url)
    assert restores == [declared]
    assert await keeper.raise_mark() == Mark(declared.epoch, declared.counter + 1)
    assert len(restores) == 1


async def test_raise_on_a_restored_database_begins_a_new_epoch(
    keeper: EpochKeeper, database_url: str
) -> None:
    restores = count_restores(keeper)
    known = await keeper.raise_mark()
    await keeper.raise_mark()
    await set_counter(database_url, 0)
    declared = await keeper.raise_mark()
    assert declared.epoch != known.epoch
    assert restores == [declared]


async def test_other_epoch_with_the_same_counter_is_a_restore(
    keeper: EpochKeeper, database_url: str
) -> None:
    known = await keeper.raise_mark()
    await fetch(database_url, "UPDATE history_epoch SET epoch = gen_random_uuid()")
    restores = count_restores(keeper)
    declared = await keeper.read()
    assert declared.epoch != known.epoch
    assert restores == [declared]


async def test_lost_row_is_a_restore(keeper: EpochKeeper, database_url: str) -> None:
    known = await keeper.raise_mark()
    await fetch(database_url, "DELETE FROM history_epoch")
    restores = count_restores(keeper)
    declared = await keeper.read()
    assert declared.epoch != known.epoch
    assert declared.counter > known.counter
    assert restores == [declared]


async def test_restored_counter_that_has_not_fallen_is_no_restore(
    keeper: EpochKeeper, database_url: str
) -> None:
    restores = count_restores(keeper)
    known = await keeper.raise_mark()
    for counter in (known.counter, known.counter + 100):
        await set_counter(database_url, counter)
        assert await keeper.read() == Mark(known.epoch, counter)
    assert restores == []


async def test_processes_agree_on_one_new_epoch(database: Database, database_url: str) -> None:
    keepers = [EpochKeeper(database) for _ in range(5)]
    for count, keeper in enumerate(keepers):  # Each has seen another counter.
        for _ in range(count):
            await keeper.raise_mark()
        await keeper.read()
    before = keepers[-1].mark
    assert before is not None
    await set_counter(database_url, 0)
    all_restores = [count_restores(keeper) for keeper in keepers[1:]]
    await asyncio.gather(*(keeper.read() for keeper in keepers[1:]))
    after = await stored_epoch(database_url)
    assert after[0] != before.epoch
    assert [keeper.mark for keeper in keepers[1:]] == [after] * 4
    assert all_restores == [[after]] * 4
    # The first process has seen no counter that was lost: only the other epoch shows the restore.
    restores = count_restores(keepers[0])
    assert await keepers[0].read() == after
    assert restores == [after]


async def test_late_result_of_an_overlapping_read_is_no_restore(
    keeper: EpochKeeper, database: DelayingDatabase, database_url: str
) -> None:
    restores = count_restores(keeper)
    known = await keeper.raise_mark()
    event = database.held_back = asyncio.Event()
    reading = asyncio.create_task(keeper.read())
    await database.has_result.wait()
    raised = [await keeper.raise_mark() for _ in range(3)][-1]
    event.set()
    assert await reading == known
    assert keeper.mark == raised
    assert restores == []
    assert (await stored_epoch(database_url))[0] == known.epoch


async def test_result_from_before_a_restore_does_not_bring_the_old_epoch_back(
    keeper: EpochKeeper, database: DelayingDatabase, database_url: str
) -> None:
    restores = count_restores(keeper)
    await keeper.raise_mark()
    event = database.held_back = asyncio.Event()
    raising = asyncio.create_task(keeper.raise_mark())
    await database.has_result.wait()
    await set_counter(database_url, 0)
    declared = await keeper.read()
    event.set()
    await raising
    assert keeper.mark == declared
    assert restores == [declared]
    assert await stored_epoch(database_url) == declared


async def test_traffic_raises_the_counter_once_an_interval(
    database: DelayingDatabase, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoch, "INTERVAL_S", 0.0)
    keeper = EpochKeeper(database)
    monkeypatch.setattr(epoch, "INTERVAL_S", 600.0)
    known = Mark(*await stored_epoch(database_url))
    for _ in range(100):
        keeper.wake()
        keeper.look()
    await until(lambda: keeper._task is None)
    assert keeper.mark == await stored_epoch(database_url) == (known.epoch, known.counter + 1)
    await keeper.stop()


async def test_check_in_the_background_notices_a_restore_and_survives_an_outage(
    keeper: EpochKeeper, database_url: str
) -> None:
    restores = count_restores(keeper)
    await keeper.raise_mark()
    await set_counter(database_url, 0)
    await fetch(database_url, "ALTER TABLE history_epoch RENAME TO missing")
    keeper.check_soon()
    await until(lambda: keeper._task is None)
    assert restores == []
    await fetch(database_url, "ALTER TABLE missing RENAME TO history_epoch")
    keeper.check_soon()
    await until(lambda: bool(restores))
    await keeper.stop()


async def test_stopped_keeper_starts_nothing(keeper: EpochKeeper) -> None:
    keeper.check_soon()
    await keeper.stop()
    keeper.check_soon()
    assert keeper._task is None
