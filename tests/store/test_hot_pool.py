"""The hot pool's connections when they break or their callers are cancelled."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import asyncpg
import pytest

from service.server import Server
from service.store.db import hot_pool
from service.store.db.hot_pool import Statement, fetch_in_transaction
from tests.support.cluster import connected_to, fetch


async def test_statement_on_a_closed_connection_raises_the_first_error(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pooler ended the connection, and other code closed it before the error is handled."""

    async def end(connection: asyncpg.Connection, *_: Any) -> NoReturn:
        connection.terminate()
        raise asyncpg.AdminShutdownError("ended")

    async with connected_to(database_url) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Connection, "fetch", end)
            with pytest.raises(asyncpg.AdminShutdownError):
                await fetch_in_transaction(connection, Statement.from_text("SELECT 1"))


READ = Statement.from_text(
    "SELECT count(*) FROM chathistory.chat_sessions"
    " WHERE user_id = '00000000-0000-0000-0000-000000000000'"
)
LOCKS = """
SELECT count(*) FROM pg_locks JOIN pg_stat_activity AS a USING (pid)
WHERE a.datname = current_database() AND relation = 'chat_sessions'::regclass
"""


async def test_call_cancelled_between_prepare_and_execute_leaves_no_lock(
    server: Server, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an idle connection a lock would block a migration until the connection's next use."""
    prepare = asyncpg.Connection._get_statement  # type: ignore[attr-defined]

    async def prepare_only(self: Any, *args: Any, **options: Any) -> NoReturn:
        await prepare(self, *args, **options)
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(asyncpg.Connection, "_get_statement", prepare_only)
        with pytest.raises(asyncio.CancelledError):
            await server.database.fetch_once(READ)
    async with asyncio.timeout(20):
        while (await fetch(database_url, LOCKS))[0][0]:
            await asyncio.sleep(0.01)
    await server.database.fetch_once(READ)


async def test_abandoned_connection_that_does_not_respond_is_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any, **__: Any) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    pool = server.database.hot_pool
    connection = await pool.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(hot_pool, "SYNC_TIMEOUT_S", 0.1)
        patch.setattr(asyncpg.Connection, "execute", never)
        pool.release_abandoned(connection)
        async with asyncio.timeout(20):
            while connection in pool._busy:
                await asyncio.sleep(0.01)
    assert connection.driver.is_closed()
    await server.database.fetch_once(READ)


async def test_released_connection_goes_to_the_first_waiter(server: Server) -> None:
    """A caller that acquires again without a pause must not overtake those that wait."""
    pool = server.database.hot_pool
    connections = [await pool.acquire() for _ in range(pool._size)]
    order: list[str] = []

    async def use(caller: str) -> None:
        connection = await pool.acquire()
        order.append(caller)
        pool.release(connection)

    waiters = [asyncio.create_task(use(f"waiter {number}")) for number in range(3)]
    await asyncio.sleep(0)
    pool.release(connections.pop())
    await use("latecomer")
    await asyncio.gather(*waiters)
    assert order == ["waiter 0", "waiter 1", "waiter 2", "latecomer"]
    for connection in connections:
        pool.release(connection)


async def test_waiter_cancelled_after_it_received_a_connection_passes_it_on(
    server: Server,
) -> None:
    pool = server.database.hot_pool
    connections = [await pool.acquire() for _ in range(pool._size)]
    cancelled, next_waiter = (asyncio.create_task(pool.acquire()) for _ in range(2))
    await asyncio.sleep(0)
    released = connections.pop()
    pool.release(released)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await next_waiter is released
    for connection in (*connections, released):
        pool.release(connection)


async def test_waiter_that_receives_a_closed_connection_opens_another(
    server: Server,
) -> None:
    pool = server.database.hot_pool
    connections = [await pool.acquire() for _ in range(pool._size)]
    waiter = asyncio.create_task(pool.acquire())
    await asyncio.sleep(0)
    released = connections.pop()
    pool.release(released)
    released.driver.terminate()
    fresh = await waiter
    assert fresh is not released
    assert not fresh.driver.is_closed()
    for connection in (*connections, fresh):
        pool.release(connection)
