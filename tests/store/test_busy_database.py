"""Calls that get no connection in time: behind other calls, or because the database is stuck."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Overloaded, Unavailable
from service.store.db import database as module
from service.store.db import retries
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.db.work_class import WorkClass


def soon(seconds: float = 20.0) -> float:
    return asyncio.get_running_loop().time() + seconds


@pytest.fixture
async def database(database_url: str) -> AsyncGenerator[Database]:
    database = Database(parse(database_url), pool_timeout_s=0.3)
    yield database
    await database.close()


@asynccontextmanager
async def permits_in_use(database: Database, *, is_moving: bool) -> AsyncGenerator[None]:
    """Hold all permits; if `is_moving`, by many short calls, otherwise by calls that are stuck."""
    is_ending = asyncio.Event()

    async def stay(_connection: AsyncConnection) -> None:
        await is_ending.wait()

    async def use_permits() -> None:
        while not is_ending.is_set():
            async with database._permits.hold("a", 60):
                await asyncio.sleep(0.01)

    async def hold() -> None:
        if is_moving:
            # Several in the queue, so that the same user's next call waits for all of them.
            await asyncio.gather(*(use_permits() for _ in range(100)))
        else:
            await database.read(stay, owner_id="a", deadline=soon(60))

    holders = [asyncio.create_task(hold()) for _ in range(database._permits.permit_count)]
    try:
        async with asyncio.timeout(20):
            while database._permits.free_count:
                await asyncio.sleep(0.001)
        yield
    finally:
        is_ending.set()
        await asyncio.gather(*holders)


@pytest.mark.parametrize("kind", ["read", "write"])
async def test_call_behind_many_others_is_overloaded_and_suggests_no_outage(
    database: Database, kind: str
) -> None:
    suspected: list[bool] = []
    database.on_suspected_outage = lambda: suspected.append(True)
    async with permits_in_use(database, is_moving=True):
        with pytest.raises(Overloaded) as refusal:
            await getattr(database, kind)(
                lambda connection: connection.execute(text("SELECT 1")),
                owner_id="a",
                deadline=soon(),
            )
    assert refusal.value.retry_after
    assert not suspected


async def test_call_behind_calls_that_are_stuck_is_unavailable_and_suggests_an_outage(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "OUTAGE_TIMEOUT_S", 0.1)
    suspected: list[bool] = []
    database.on_suspected_outage = lambda: suspected.append(True)
    async with permits_in_use(database, is_moving=False):
        with pytest.raises(Unavailable):
            await database.read(
                lambda connection: connection.execute(text("SELECT 1")),
                owner_id="b",
                deadline=soon(),
            )
    assert suspected


@pytest.mark.parametrize("work_class", WorkClass)
async def test_abandoned_expensive_work_suggests_no_outage(
    database: Database, monkeypatch: pytest.MonkeyPatch, work_class: WorkClass
) -> None:
    monkeypatch.setitem(module.SUSPICIOUS_WAITS_S, WorkClass.ORDINARY, 0.05)
    suspected: list[bool] = []
    database.on_suspected_outage = lambda: suspected.append(True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await database.read(
                lambda connection: connection.execute(text("SELECT pg_sleep(20)")),
                owner_id="a",
                deadline=soon(),
                work_class=work_class,
            )
    assert bool(suspected) == (work_class is WorkClass.ORDINARY)


async def test_write_is_dropped_if_its_caller_leaves_before_it_begins(database: Database) -> None:
    runs: list[str] = []

    async def work(_connection: AsyncConnection) -> None:
        runs.append("work")

    async with permits_in_use(database, is_moving=False):
        writing = asyncio.create_task(database.write(work, owner_id="b", deadline=soon()))
        async with asyncio.timeout(20):
            while not database.waiting_count:
                await asyncio.sleep(0.001)
            writing.cancel()
            await asyncio.wait([writing])
            await database.writes_in_flight.drain()
        assert (database.waiting_count, writing.cancelled()) == (0, True)
    assert not runs
    assert database._write_permits.free_count == database._write_permits.permit_count


async def test_write_that_has_begun_is_committed_although_its_caller_leaves(
    database: Database,
) -> None:
    has_begun, may_end = asyncio.Event(), asyncio.Event()

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(text("CREATE TABLE written ()"))
        has_begun.set()
        await may_end.wait()

    writing = asyncio.create_task(database.write(work, owner_id="b", deadline=soon()))
    async with asyncio.timeout(20):
        await has_begun.wait()
        writing.cancel()
        await asyncio.wait([writing])
        may_end.set()
        await database.writes_in_flight.drain()
    rows = await database.read(
        lambda connection: connection.scalar(text("SELECT count(*) FROM written")),
        owner_id="b",
        deadline=soon(),
    )
    assert rows == 0
