"""The pool as Neon needs it: its size and order, pings, recycling and the connect timeout."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Unavailable
from service.store.db import engine, retries
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.db.hot_pool import Statement
from service.store.db.work_class import WorkClass
from tests.support.chat import new_id
from tests.support.cluster import Cluster, fetch
from tests.support.proxy import Direction, postgres_proxy
from tests.support.servers import serving, settings
from tests.support.statements import SentStatements

OWNER = "a user"


def soon(seconds: float = 20.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def backend(connection: AsyncConnection) -> int:
    return int(await connection.scalar(text("SELECT pg_backend_pid()")) or 0)


async def backends(database: Database, count: int) -> list[int]:
    """Use `count` connections concurrently, and return their backends in order of release."""
    turn = asyncio.Semaphore(0)
    held: list[int] = []

    async def hold(connection: AsyncConnection) -> int:
        held.append(await backend(connection))
        await turn.acquire()
        return held[-1]

    tasks = [
        asyncio.create_task(database.read(hold, owner_id=OWNER, deadline=soon()))
        for _ in range(count)
    ]
    async with asyncio.timeout(20):
        while len(held) < count:
            await asyncio.sleep(0.01)
        for n in range(1, count + 1):
            turn.release()
            while database.engine.pool.checkedin() < n:  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    return held


def test_pool_defaults_fit_neon() -> None:
    """Neon suspends a database after five idle minutes, and needs up to some seconds to wake it."""
    defaults = settings()
    assert 60 <= defaults.db_pool_recycle < 300
    assert 10 <= defaults.db_connect_timeout <= 15
    assert engine.PING_AFTER_IDLE_S == 30


@pytest.mark.parametrize("route", ["on", "off"], ids=["direct", "pooled"])
async def test_service_applies_the_pool_settings(database_url: str, route: str) -> None:
    async with serving(parse(database_url, prepared_statements=route)) as server:
        pool = server.database.engine.pool
        assert pool._recycle == server.settings.db_pool_recycle
        assert pool._pool.use_lifo  # type: ignore[attr-defined]
        assert (pool._pool.maxsize, pool._max_overflow) == (8, 4)  # type: ignore[attr-defined]


async def test_pool_uses_the_last_used_connection_first(database_url: str) -> None:
    database = Database(parse(database_url))
    held = await backends(database, 4)
    assert len(set(held)) == 4
    assert [await database.read(backend, owner_id=OWNER, deadline=soon()) for _ in range(6)] == [
        held[-1]
    ] * 6
    await database.close()


@pytest.mark.faults
async def test_connection_older_than_recycle_is_replaced(database_url: str) -> None:
    database = Database(parse(database_url), recycle_s=3)
    first = await database.read(backend, owner_id=OWNER, deadline=soon())
    assert await database.read(backend, owner_id=OWNER, deadline=soon()) == first
    await asyncio.sleep(3.2)
    assert await database.read(backend, owner_id=OWNER, deadline=soon()) != first
    await database.close()


async def test_only_long_idle_connections_are_pinged(
    database_url: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(parse(database_url))
    first = await database.read(backend, owner_id=OWNER, deadline=soon())
    sent = SentStatements(cluster, database_url)
    assert await database.read(backend, owner_id=OWNER, deadline=soon()) == first
    assert [statement.sql for statement in sent.so_far()] == ["SELECT pg_backend_pid()"]
    monkeypatch.setattr(engine, "PING_AFTER_IDLE_S", 0.0)
    await asyncio.sleep(0.05)
    sent = SentStatements(cluster, database_url)
    assert await database.read(backend, owner_id=OWNER, deadline=soon()) == first
    *ping, last = [statement.sql for statement in sent.so_far()]
    assert ping, "the connection was pinged"
    assert last == "SELECT pg_backend_pid()"
    await database.close()


async def test_connecting_stops_at_the_connect_timeout(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server does not respond; a timeout in the URL has precedence over the setting."""
    monkeypatch.setattr(retries, "OUTAGE_TIMEOUT_S", 0.1)
    async with postgres_proxy(database_url) as (proxy, url):
        proxy.block(Direction.TO_CLIENT)
        for address, connect_timeout in ((url, 0.3), (f"{url}&connect_timeout=1", 600.0)):
            database = Database(parse(address), connect_timeout_s=connect_timeout)
            async with asyncio.timeout(20):
                with pytest.raises(Unavailable):
                    await database.read(backend, owner_id=OWNER, deadline=soon(60))
            await database.close()


async def test_hot_pool_is_available_while_all_permits_are_held(
    database_url: str,
) -> None:
    """Reads and writes hold every permit, and many more wait."""
    database = Database(parse(database_url))
    released = asyncio.Event()

    async def hold(connection: AsyncConnection) -> int:
        pid = await backend(connection)
        await released.wait()
        return pid

    held = [
        asyncio.create_task(kind(hold, owner_id=f"{n % 5}", deadline=soon(60)))
        for n in range(50)
        for kind in (database.read, database.write)
    ]
    await asyncio.sleep(0.2)
    async with asyncio.timeout(20):
        hot = [await database.hot_pool.acquire() for _ in range(6)]
        while database.engine.pool.checkedout() < 12:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
    for connection in hot:
        database.hot_pool.release(connection)
    assert database.engine.pool.checkedout() == 12  # type: ignore[attr-defined]
    released.set()
    assert len(set(await asyncio.gather(*held))) <= 12
    await database.close()


@pytest.mark.parametrize("work_class", WorkClass)
async def test_call_that_is_cancelled_at_any_moment_leaves_no_transaction_to_the_next(
    database_url: str, work_class: WorkClass
) -> None:
    """asyncpg would nest the next transaction in one whose BEGIN was cancelled, and never commit.

    The two connections of this pool serve the cancelled calls and the writes between them.
    """
    await fetch(database_url, "CREATE TABLE marks (id text)")
    database = Database(parse(database_url), pool_size=1, max_overflow=1)
    stored: list[str] = []

    async def read(connection: AsyncConnection) -> None:
        await connection.execute(text("SELECT 1"))

    async def write(connection: AsyncConnection) -> None:
        values = {"id": new_id()}
        await connection.execute(text("INSERT INTO marks VALUES (:id)"), values)
        stored.append(values["id"])

    for run in (database.read, database.write):
        for turns in range(40):
            call = run(read, owner_id=OWNER, deadline=soon(), work_class=work_class)
            task = asyncio.create_task(call)
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await database.write(write, owner_id=OWNER, deadline=soon())
    await database.close(5)
    rows = await fetch(database_url, "SELECT id FROM marks")
    assert set(stored) <= {row["id"] for row in rows}


@pytest.mark.parametrize("is_known_to_the_driver", [True, False])
async def test_connection_that_comes_back_with_a_transaction_is_closed(
    database_url: str, is_known_to_the_driver: bool
) -> None:
    await fetch(database_url, "CREATE TABLE marks (id text)")
    database = Database(parse(database_url), pool_size=1, max_overflow=0)

    async def leave_a_transaction(connection: AsyncConnection) -> int:
        raw = await connection.get_raw_connection()
        driver = raw.driver_connection
        assert driver is not None
        if is_known_to_the_driver:
            await driver.transaction().start()
        else:
            await driver.execute("BEGIN;")
        return int(await driver.fetchval("SELECT pg_backend_pid()"))

    async def write(connection: AsyncConnection) -> int:
        await connection.execute(text("INSERT INTO marks VALUES ('stored')"))
        return await backend(connection)

    left = await database.read(leave_a_transaction, owner_id=OWNER, deadline=soon())
    assert await database.write(write, owner_id=OWNER, deadline=soon()) != left
    await database.close(5)
    assert len(await fetch(database_url, "SELECT id FROM marks")) == 1


async def test_next_generation_replaces_idle_connections_now_and_busy_ones_when_released(
    database_url: str,
) -> None:
    database = Database(parse(database_url), pool_size=4, max_overflow=0, hot_pool_size=2)
    read = Statement.from_text("SELECT pg_backend_pid()")
    busy = await database.hot_pool.acquire()
    before = {
        busy.driver.get_server_pid(),
        (await database.fetch_once(read))[0][0],
        await database.read(backend, owner_id=OWNER, deadline=soon()),
    }
    database.start_generation()
    after = {
        (await database.fetch_once(read))[0][0],
        await database.read(backend, owner_id=OWNER, deadline=soon()),
    }
    assert len(before) == 3
    assert after.isdisjoint(before)
    assert await busy.driver.fetchval("SELECT 1") == 1
    database.hot_pool.release(busy)
    assert (await database.fetch_once(read))[0][0] not in before
    async with asyncio.timeout(20):
        while not busy.driver.is_closed():
            await asyncio.sleep(0.01)
    await database.close()
