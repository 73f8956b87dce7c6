"""A transaction pooler between the service and PostgreSQL: it ends, comes back, shares few connections, and migrations run meanwhile.

`make test-faults` also runs all of tests/rpc through it (`pytest --through pgbouncer tests/rpc`).
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub as Stub
from sqlalchemy import Connection, make_url, text

from service.server import Server
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.db.hot_pool import Statement
from service.store.schema import migrations
from tests.faults.conftest import calls_by_route
from tests.support import pgbouncer
from tests.support.chat import Chat
from tests.support.clients import client_of
from tests.support.cluster import Cluster, connected_to, fetch
from tests.support.conversations import conversations
from tests.support.history import read_history, read_valid_history
from tests.support.load import Load, fast_reconnect_options
from tests.support.next_build import NextBuild
from tests.support.pgbouncer import PgBouncer
from tests.support.proxy import Direction, Link, Proxy
from tests.support.record import judge
from tests.support.servers import ServerProcess, channel, connected, serving
from tests.support.statements import database_name
from tests.support.tools import skip_or_fail

FEW = 3
"""Connections to PostgreSQL that all clients of the pooler share."""


@pytest.fixture
def pooler(cluster: Cluster) -> Generator[PgBouncer]:
    """Give a PgBouncer of this test's own."""
    if pgbouncer.find_program() is None:
        skip_or_fail("pgbouncer is not installed")
    with PgBouncer(cluster.url("postgres"), {"default_pool_size": str(FEW)}) as started:
        yield started


@pytest.fixture
def pooled_url(pooler: PgBouncer, database_url: str) -> str:
    """Give the connection string of the test's database through the pooler."""
    return pooler.url(database_name(database_url))


@asynccontextmanager
async def under_load(url: str, **load: int) -> AsyncGenerator[tuple[Server, Load]]:
    """Run a service with writers and followers, who never give up."""
    async with (
        serving(url) as server,
        channel(server.address, **fast_reconnect_options()) as opened,
    ):
        running = Load(await Chat.of_new_user(Stub(opened)), **load)
        async with running.running():
            yield server, running
        print(f"{running.count} messages, refusals {running.refusals}")


# --- As it is.


async def test_clients_share_few_connections_without_named_statements(
    cluster: Cluster, pooled_url: str, database_url: str
) -> None:
    """Each transaction of two services may meet any of the pooler's connections; what one has prepared another does not know."""
    before = cluster.postgres.log.stat().st_size
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(serving(pooled_url)) for _ in range(2)]
        assert not any(server.database.target.prepared_statements for server in servers)
        stubs = [await stack.enter_async_context(connected(server.address)) for server in servers]
        chat = await Chat.of_new_user(stubs[0])
        chats = [chat, Chat(stubs[1], chat.user_id)]
        session_ids = [await chat.start() for _ in range(4)]
        calls = [
            call for each in chats for s in session_ids for call in calls_by_route(each, s).values()
        ]
        for _ in range(5):
            await asyncio.gather(*(call() for call in calls))
        [[connections]] = await fetch(
            database_url,
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'chat-history'",
        )
        assert 0 < connections <= FEW
    for session_id in session_ids:
        assert (
            await read_valid_history(database_url, chat.user_id, session_id)
        ).last_seq == 1 + 5 * 2
    with cluster.postgres.log.open("rb") as log:
        log.seek(before)
        written = log.read().decode()
    assert set(re.findall(r"LOG:  execute ([^:\n]+):", written)) == {"<unnamed>"}
    assert "SET client_encoding" not in written, "the pooler sets up each transaction anew"


@pytest.mark.case(n=5)
@pytest.mark.parametrize("word", [b"BEGIN", b"SELECT 1", b"COMMIT"])
async def test_cancelled_call_leaves_no_transaction_open(
    pooler: PgBouncer, pooled_url: str, database_url: str, word: bytes
) -> None:
    """A caller is cancelled while the answer to a piece of its transaction is on its way. What is stored next is committed."""
    await fetch(database_url, "CREATE TABLE kept (n int)")
    sent = asyncio.Event()

    def see(_link: Link, way: Direction, piece: bytes) -> bool:
        if way is Direction.TO_SERVER and word in piece:
            proxy.block(Direction.TO_CLIENT)
            sent.set()
        return True

    async with Proxy(f"127.0.0.1:{pooler.port}") as proxy:
        url = make_url(pooled_url).set(port=proxy.port).render_as_string(hide_password=False)
        # One connection for the hot statements: the next one has the same if that is still good.
        database = Database(parse(url), hot_pool_size=1)
        try:
            select, insert = (
                Statement.from_text("SELECT 1"),
                Statement.from_text("INSERT INTO kept VALUES ($1)"),
            )
            await database.fetch_once(select)
            proxy.tap = see
            leaving = asyncio.create_task(database.fetch_once(select))
            async with asyncio.timeout(20):
                await sent.wait()
            leaving.cancel()
            await asyncio.wait([leaving], timeout=10)
            assert leaving.cancelled(), (
                "who goes away does not wait for a database that says nothing"
            )
            proxy.tap = lambda *_: True
            proxy.unblock()
            for n in range(3):
                await database.fetch_once(insert, n)
            assert [
                row["n"] for row in await fetch(database_url, "SELECT n FROM kept ORDER BY n")
            ] == [0, 1, 2]
        finally:
            await database.close()


# --- It ends and comes back.


async def test_calls_succeed_after_all_server_connections_were_terminated(
    pooled_url: str, database_url: str
) -> None:
    async with serving(pooled_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        for name, call in calls_by_route(chat, session_id).items():
            [[ended]] = await fetch(
                database_url,
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid != pg_backend_pid()",
            )
            assert ended > 0, name
            await call()


def restart(pooler: PgBouncer) -> None:
    pooler.stop()
    pooler.start()


def kill(pooler: PgBouncer) -> None:
    pooler.kill()
    pooler.start()


@pytest.mark.case(n=23)
@pytest.mark.parametrize("end", [restart, kill], ids=["restarted", "killed"])
@pytest.mark.timeout(300)
async def test_no_append_is_lost_when_the_pooler_ends_under_load(
    pooler: PgBouncer, pooled_url: str, database_url: str, end: Callable[[PgBouncer], None]
) -> None:
    async with under_load(pooled_url) as (server, load):
        for _ in range(6):
            await load.wait_for_appends(100)
            await asyncio.to_thread(end, pooler)
        await load.wait_for_appends(200)
        async with asyncio.timeout(20):
            while not server.readiness.is_ready:
                await asyncio.sleep(0.05)
    await load.check(database_url)
    assert load.count >= 6 * 100 + 200


@pytest.mark.case(n=23)
async def test_calls_wait_while_the_pooler_is_down(
    pooler: PgBouncer, pooled_url: str, database_url: str
) -> None:
    async with serving(pooled_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        pooler.stop()
        calls = [
            asyncio.ensure_future(call()) for call in calls_by_route(chat, session_id).values()
        ]
        await asyncio.wait(calls, timeout=3.0)
        await asyncio.to_thread(pooler.start)
        await asyncio.gather(*calls)
        assert (await read_valid_history(database_url, chat.user_id, session_id)).last_seq == 2


# --- Migrations.


@pytest.fixture(params=["pooler", "direct"])
def served_url(request: pytest.FixtureRequest, database_url: str) -> str:
    """Give what a service is told: through the pooler, or directly, where statements are prepared and kept."""
    if request.param == "direct":
        return database_url
    url: str = request.getfixturevalue("pooled_url")
    return url


EXPAND = (
    "ALTER TABLE chat_messages ADD COLUMN later_{n} text NOT NULL DEFAULT ''",
    "ALTER TABLE chat_sessions ADD COLUMN later_{n} jsonb",
    # Other types of the results: what is prepared for the old ones is refused by PostgreSQL.
    "ALTER TABLE chat_sessions ALTER COLUMN title TYPE varchar({size})",
    "ALTER TABLE chat_messages ALTER COLUMN content TYPE {text}",
)


def _statement(number: int, sql: str) -> Callable[[Connection], None]:
    statement = text(sql.format(n=number, size=1000 + number, text=("text", "varchar")[number % 2]))

    def work(connection: Connection) -> None:
        connection.execute(statement)

    return work


async def _call_until_stopped(chat: Chat, session_id: str, stopping: asyncio.Event) -> int:
    """Call in every way until told to stop; no call may fail. Returns how often all of them were made."""
    rounds = 0
    while not stopping.is_set():
        await asyncio.gather(*(call() for call in calls_by_route(chat, session_id).values()))
        rounds += 1
    return rounds


async def _migrate_under_calls(
    url: str, database_url: str, migrate: Callable[[], Awaitable[None]]
) -> None:
    """Migrate while clients call in every way, who see no error and need no retry of theirs."""
    stopping = asyncio.Event()
    # Each for as long as a call may take by itself: no deadline of a caller's hides an error, or is one.
    async with (
        under_load(url, call_timeout_s=30) as (server, load),
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_ids = [await chat.start() for _ in range(6)]
        asking = [
            asyncio.create_task(_call_until_stopped(chat, each, stopping)) for each in session_ids
        ]
        try:
            await load.wait_for_appends(100)
            await migrate()
            await load.wait_for_appends(100)
        finally:
            stopping.set()
            rounds = await asyncio.gather(*asking)
        assert all(rounds)
    assert load.refusals == {}
    await load.check(database_url)
    for session_id, count in zip(session_ids, rounds, strict=True):
        assert (
            await read_valid_history(database_url, chat.user_id, session_id)
        ).last_seq == 1 + count


@pytest.mark.case(n=22)
@pytest.mark.timeout(300)
async def test_calls_succeed_while_tables_are_altered_under_load(
    served_url: str, database_url: str
) -> None:
    async def migrate() -> None:
        for n in range(8):
            for sql in EXPAND:
                await migrations.in_transaction(parse(database_url), _statement(n, sql))
            await asyncio.sleep(0.2)

    await _migrate_under_calls(served_url, database_url, migrate)


@pytest.mark.case(n=22)
@pytest.mark.timeout(300)
async def test_calls_succeed_while_the_next_build_migrates_under_load(
    served_url: str, database_url: str, tmp_path: Path
) -> None:
    build = NextBuild(
        tmp_path,
        "ALTER TABLE chat_messages ADD COLUMN later text NOT NULL DEFAULT ''",
        "ALTER TABLE chat_sessions ALTER COLUMN title TYPE varchar(1000)",
        "CREATE TABLE next (user_id uuid PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE)",
    )

    async def migrate() -> None:
        await build.migrate(served_url)

    await _migrate_under_calls(served_url, database_url, migrate)
    [[revision]] = await fetch(database_url, "SELECT version_num FROM alembic_version")
    assert int(revision) == build.revision


BUSY = "other transactions hold the locks"


@pytest.mark.case(n=22)
@pytest.mark.timeout(300)
async def test_rolling_update_causes_no_client_errors(
    served_url: str, database_url: str, tmp_path: Path
) -> None:
    """Migrate, then replace the replicas (docs/how-to/migrations.md), while users of the client library append, read and follow.

    The migration meets somebody who holds what it needs for longer than it waits, and then itself keeps everybody out for a second.
    """
    build = NextBuild(
        tmp_path / "next",
        "ALTER TABLE chat_messages ADD COLUMN later text NOT NULL DEFAULT ''",
        "SELECT pg_sleep(1)",
    )
    async with AsyncExitStack() as exits:

        async def start(name: str, *, ready: bool = True, **given: Any) -> ServerProcess:
            process = ServerProcess(
                served_url, tmp_path / name, CHAT_HISTORY_SHUTDOWN_GRACE="30", **given
            )
            exits.push_async_callback(process.stop)
            return await process.start(ready=ready)

        old = [await start(f"old {n}") for n in range(2)]
        client = await exits.enter_async_context(
            client_of("ipv4:" + ",".join(each.address for each in old))
        )
        async with conversations(client, count=6) as talks:
            early = await start("early", ready=False, command=build.server_command)
            serving_early = asyncio.create_task(early.wait_ready())
            await asyncio.sleep(1)
            async with connected_to(database_url) as other:
                await other.execute("BEGIN; LOCK TABLE chat_messages IN ACCESS SHARE MODE")
                waits = asyncio.Event()
                migrating = asyncio.create_task(
                    build.migrate(served_url, lambda line: waits.set() if BUSY in line else None)
                )
                await asyncio.wait(
                    [asyncio.create_task(waits.wait()), migrating],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                assert not migrating.done()
                assert not serving_early.done()
            await migrating
            await serving_early
            for n, replica in enumerate(old):
                await asyncio.sleep(1)
                replica.send_signal(signal.SIGTERM)
                assert await replica.wait() == 0
                await start(
                    f"new {n}", command=build.server_command, CHAT_HISTORY_LISTEN=replica.address
                )
            await asyncio.sleep(1)
    for record in talks:
        assert (
            judge(record, await read_history(database_url, record.user_id, record.session_id)) == []
        )
        assert record.acknowledged > 20
    print(f"{sum(record.acknowledged for record in talks)} messages")
