"""The driver's own connections, where they break."""

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
    """The pooler has ended it, and somebody else has given it up before that is looked at."""

    async def ended(connection: asyncpg.Connection, *_: Any) -> NoReturn:
        connection.terminate()
        raise asyncpg.AdminShutdownError("ended")

    async with connected_to(database_url) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Connection, "fetch", ended)
            with pytest.raises(asyncpg.AdminShutdownError):
                await fetch_in_transaction(connection, Statement.from_text("SELECT 1"))


READ = Statement.from_text(
    "SELECT count(*) FROM chat_sessions WHERE user_id = '00000000-0000-0000-0000-000000000000'"
)
LOCKS = """
SELECT count(*) FROM pg_locks JOIN pg_stat_activity AS a USING (pid)
WHERE a.datname = current_database() AND relation = 'chat_sessions'::regclass
"""


async def test_call_cancelled_between_prepare_and_execute_leaves_no_lock(
    server: Server, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection waits in the pool, and a lock on it would keep a migration out for as long."""
    prepare = asyncpg.Connection._get_statement  # type: ignore[attr-defined]

    async def prepared(self: Any, *args: Any, **options: Any) -> NoReturn:
        await prepare(self, *args, **options)
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(asyncpg.Connection, "_get_statement", prepared)
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

    connections = server.database.hot_pool
    kept = await connections.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(hot_pool, "SYNC_TIMEOUT_S", 0.1)
        patch.setattr(asyncpg.Connection, "execute", never)
        connections.release_abandoned(kept)
        async with asyncio.timeout(20):
            while kept in connections._busy:
                await asyncio.sleep(0.01)
    assert kept.driver.is_closed()
    await server.database.fetch_once(READ)
