"""Expensive database work: its permits, its queue, and the limits of its statements."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import DeadlineExceeded, Overloaded
from service.store.db import work_class as module
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.db.work_class import WorkClass

EXPENSIVE = WorkClass.EXPENSIVE


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be busy: no call may time out in the queue unless its test is about that."""
    monkeypatch.setattr(module, "MAX_WAIT_S", 60.0)


@pytest.fixture
async def database(database_url: str) -> AsyncGenerator[Database]:
    database = Database(parse(database_url))
    yield database
    await database.close()


def soon(seconds: float = 20.0) -> float:
    return asyncio.get_running_loop().time() + seconds


class Holder:
    """Expensive work that holds its permit until `end` is called."""

    def __init__(self, database: Database, owner_id: str, started: list[str]) -> None:
        self._owner_id = owner_id
        self._started = started
        self._ended = asyncio.Event()
        self.task = asyncio.create_task(
            database.read(self._work, owner_id=owner_id, deadline=soon(60), work_class=EXPENSIVE)
        )

    async def _work(self, connection: AsyncConnection) -> None:
        self._started.append(self._owner_id)
        await self._ended.wait()

    async def end(self) -> None:
        self._ended.set()
        await self.task


async def wait_for(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_one_user_leaves_a_permit_to_others(database: Database) -> None:
    started: list[str] = []
    permits = database.expensive_work.permits
    assert permits.permit_count == 2
    first, second = (Holder(database, "a", started) for _ in range(2))
    await wait_for(lambda: permits.waiting_count == 1 and started == ["a"])
    assert permits.free_count == 1
    other = Holder(database, "b", started)
    await wait_for(lambda: started == ["a", "b"])
    await other.end()
    assert started == ["a", "b"]
    await first.end()
    await wait_for(lambda: started == ["a", "b", "a"])
    await second.end()
    assert (permits.free_count, permits.waiting_count) == (2, 0)


@pytest.mark.parametrize(("connection_count", "permit_count"), [(1, 1), (3, 1), (6, 2), (60, 3)])
async def test_expensive_work_holds_at_most_a_third_of_the_connections(
    connection_count: int, permit_count: int
) -> None:
    assert module.ExpensiveWork(connection_count).permits.permit_count == permit_count


async def test_users_take_turns_on_a_single_permit(database_url: str) -> None:
    database = Database(parse(database_url), pool_size=3, max_overflow=0)
    started: list[str] = []
    assert database.expensive_work.permits.permit_count == 1
    holders = [Holder(database, owner_id, started) for owner_id in "aaab"]
    await wait_for(lambda: database.expensive_work.permits.waiting_count == 3)
    for index in (0, 1, 3, 2):
        await holders[index].end()
    assert started == ["a", "a", "b", "a"]
    await database.close()


@pytest.mark.parametrize("limit", ["MAX_WAITING_PER_USER", "MAX_WAITING"])
async def test_work_beyond_the_queue_is_refused_with_a_delay(
    database_url: str, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(module, limit, 3)
    database = Database(parse(database_url))
    started: list[str] = []
    holders = [Holder(database, "a", started) for _ in range(4)]
    permits = database.expensive_work.permits
    await wait_for(lambda: permits.waiting_count == 3 and started == ["a"])
    for call in (database.read, database.write):
        with pytest.raises(Overloaded) as refusal:
            await call(
                lambda connection: connection.scalar(text("SELECT 1")),
                owner_id="a",
                deadline=soon(),
                work_class=EXPENSIVE,
            )
        assert refusal.value.retry_after
    other = Holder(database, "b", started)
    await wait_for(lambda: started == ["a", "b"])
    for holder in (other, *holders):
        await holder.end()
    await database.close()


async def test_work_that_waits_too_long_is_refused_and_is_no_sign_of_an_outage(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAIT_S", 0.05)
    suspected: list[bool] = []
    database.on_suspected_outage = lambda: suspected.append(True)
    started: list[str] = []
    first = Holder(database, "a", started)
    await wait_for(lambda: started == ["a"])
    second = Holder(database, "a", started)
    with pytest.raises(Overloaded):
        await second.task
    await first.end()
    assert not suspected
    assert started == ["a"]


async def test_ordinary_work_and_hot_statements_need_no_permit_of_expensive_work(
    database: Database,
) -> None:
    started: list[str] = []
    holders = [Holder(database, owner_id, started) for owner_id in "abcdefgh"]
    await wait_for(lambda: database.expensive_work.permits.waiting_count == 6)
    for call in (database.read, database.write):
        result = await call(
            lambda connection: connection.scalar(text("SELECT 1")),
            owner_id="x",
            deadline=soon(),
        )
        assert result == 1
    hot = [await database.hot_pool.acquire() for _ in range(6)]
    for connection in hot:
        database.hot_pool.release(connection)
    for holder in holders:
        holder._ended.set()
    await asyncio.gather(*(holder.task for holder in holders))


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("route", ["on", "off"], ids=["direct", "pooled"])
async def test_statements_of_expensive_work_have_limits_that_end_with_the_transaction(
    database_url: str, kind: str, route: str
) -> None:
    database = Database(parse(database_url, prepared_statements=route), pool_size=3, max_overflow=0)
    call = getattr(database, kind)

    async def limits(connection: AsyncConnection) -> tuple[str, str]:
        timeout = await connection.scalar(text("SHOW statement_timeout"))
        workers = await connection.scalar(text("SHOW max_parallel_workers_per_gather"))
        return str(timeout), str(workers)

    before = await call(limits, owner_id="a", deadline=soon())
    assert before[0] == "0"
    assert await call(limits, owner_id="a", deadline=soon(), work_class=EXPENSIVE) == ("5s", "0")
    timeout, _ = await call(limits, owner_id="a", deadline=soon(3), work_class=EXPENSIVE)
    assert 0 < int(timeout.removesuffix("ms")) < 3000
    assert await call(limits, owner_id="a", deadline=soon()) == before
    await database.close()


@pytest.mark.parametrize("kind", ["read", "write"])
async def test_statement_beyond_the_limit_ends_with_a_message_about_the_request(
    database: Database, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(module, "STATEMENT_TIMEOUT_S", 0.05)
    attempts = 0

    async def sleep(connection: AsyncConnection) -> None:
        nonlocal attempts
        attempts += 1
        await connection.execute(text("SELECT pg_sleep(60)"))

    with pytest.raises(DeadlineExceeded, match=r"took longer than 0\.05 s, the limit"):
        await getattr(database, kind)(sleep, owner_id="a", deadline=soon(), work_class=EXPENSIVE)
    assert attempts == 1
    assert database.expensive_work.permits.free_count == 2


async def test_statement_ends_at_the_deadline_of_the_call(database: Database) -> None:
    with pytest.raises(DeadlineExceeded, match="the database did not respond in time"):
        await database.read(
            lambda connection: connection.execute(text("SELECT pg_sleep(60)")),
            owner_id="a",
            deadline=soon(0.4),
            work_class=EXPENSIVE,
        )


async def test_rejection_is_delayed_so_that_immediate_retries_do_not_pile_up(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_PER_USER", 1)
    pauses: list[float] = []
    may_end = asyncio.Event()

    class PausedSleep:
        """The module's `asyncio`, with a sleep that the test ends."""

        def __getattr__(self, name: str) -> object:
            return getattr(asyncio, name)

        async def sleep(self, delay_s: float) -> None:
            pauses.append(delay_s)
            await may_end.wait()

    monkeypatch.setattr(module, "asyncio", PausedSleep())
    database = Database(parse(database_url))
    started: list[str] = []
    holders = [Holder(database, "a", started) for _ in range(2)]
    expensive_work = database.expensive_work
    await wait_for(lambda: expensive_work.permits.waiting_count == 1 and started == ["a"])
    rejected = [Holder(database, "a", started) for _ in range(3)]
    await wait_for(lambda: expensive_work.rejected_count == 3)
    assert pauses == [module.REJECTION_PAUSE_S] * 3
    assert expensive_work.permits.waiting_count == 1, "rejected work does not wait for a permit"
    other = Holder(database, "b", started)
    await wait_for(lambda: started == ["a", "b"])
    may_end.set()
    for holder in rejected:
        with pytest.raises(Overloaded):
            await holder.end()
    for holder in (other, *holders):
        await holder.end()
    await database.close()
