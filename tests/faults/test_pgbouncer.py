"""A transaction pooler between the service and PostgreSQL: few connections, outages, migrations.

`make test-poolers` runs all of tests/rpc through it (`pytest --through pgbouncer tests/rpc`).
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

SERVER_CONNECTIONS = 3
"""The connections to PostgreSQL that all clients of the pooler share."""


@pytest.fixture
def pooler(cluster: Cluster) -> Generator[PgBouncer]:
    """Provide a PgBouncer for one test."""
    if pgbouncer.find_program() is None:
        skip_or_fail("pgbouncer is not installed")
    settings = {"default_pool_size": str(SERVER_CONNECTIONS)}
    with PgBouncer(cluster.url("postgres"), settings) as pooler:
        yield pooler


@pytest.fixture
def pooled_url(pooler: PgBouncer, database_url: str) -> str:
    """Provide the connection string of the test's database through the pooler."""
    return pooler.url(database_name(database_url))


@asynccontextmanager
async def under_load(url: str, **options: int) -> AsyncGenerator[tuple[Server, Load]]:
    """Run a service with writers and followers that retry until they succeed."""
    async with (
        serving(url) as server,
        channel(server.address, **fast_reconnect_options()) as connection,
    ):
        load = Load(await Chat.of_new_user(Stub(connection)), **options)
        async with load.running():
            yield server, load
        print(f"{load.count} messages, refusals {load.refusals}")


# --- A pooler that runs.


async def test_clients_share_few_connections_without_named_statements(
    cluster: Cluster, pooled_url: str, database_url: str
) -> None:
    """Each transaction may run on any server connection, so no statement may have a name.

    A named statement would exist on the connection on which it was prepared, and on no other.
    """
    log_offset = cluster.postgres.log.stat().st_size
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(serving(pooled_url)) for _ in range(2)]
        assert not any(server.database.target.prepared_statements for server in servers)
        stubs = [await stack.enter_async_context(connected(server.address)) for server in servers]
        chat = await Chat.of_new_user(stubs[0])
        chats = [chat, Chat(stubs[1], chat.user_id)]
        session_ids = [await chat.start() for _ in range(4)]
        calls = [
            call
            for chat in chats
            for session_id in session_ids
            for call in calls_by_route(chat, session_id).values()
        ]
        for _ in range(5):
            await asyncio.gather(*(call() for call in calls))
        [[connections]] = await fetch(
            database_url,
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'chat-history'",
        )
        assert 0 < connections <= SERVER_CONNECTIONS
    for session_id in session_ids:
        assert (
            await read_valid_history(database_url, chat.user_id, session_id)
        ).last_seq == 1 + 5 * 2
    with cluster.postgres.log.open("rb") as log:
        log.seek(log_offset)
        lines = log.read().decode()
    assert set(re.findall(r"LOG:  execute ([^:\n]+):", lines)) == {"<unnamed>"}
    assert "SET client_encoding" not in lines, "the pooler sets up every transaction again"


@pytest.mark.case(n=5)
@pytest.mark.parametrize("command", [b"BEGIN", b"SELECT 1", b"COMMIT"])
async def test_cancelled_call_leaves_no_transaction_open(
    pooler: PgBouncer, pooled_url: str, database_url: str, command: bytes
) -> None:
    """A call is cancelled while it waits for the reply to a command of its transaction.

    Later transactions are committed nevertheless.
    """
    await fetch(database_url, "CREATE TABLE kept (n int)")
    sent = asyncio.Event()

    def block_reply(_link: Link, direction: Direction, piece: bytes) -> bool:
        if direction is Direction.TO_SERVER and command in piece:
            proxy.block(Direction.TO_CLIENT)
            sent.set()
        return True

    async with Proxy(f"127.0.0.1:{pooler.port}") as proxy:
        url = make_url(pooled_url).set(port=proxy.port).render_as_string(hide_password=False)
        # One connection for hot statements, so that the next statement uses the same one, if the
        # service has kept it.
        database = Database(parse(url), hot_pool_size=1)
        try:
            select, insert = (
                Statement.from_text("SELECT 1"),
                Statement.from_text("INSERT INTO kept VALUES ($1)"),
            )
            await database.fetch_once(select)
            proxy.tap = block_reply
            call = asyncio.create_task(database.fetch_once(select))
            async with asyncio.timeout(20):
                await sent.wait()
            call.cancel()
            await asyncio.wait([call], timeout=10)
            assert call.cancelled(), "a cancelled call waits for a database that does not reply"
            proxy.tap = lambda *_: True
            proxy.unblock()
            for n in range(3):
                await database.fetch_once(insert, n)
            assert [
                row["n"] for row in await fetch(database_url, "SELECT n FROM kept ORDER BY n")
            ] == [0, 1, 2]
        finally:
            await database.close()


# --- Outages of the pooler.


async def test_calls_succeed_after_all_server_connections_were_terminated(
    pooled_url: str, database_url: str
) -> None:
    async with serving(pooled_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        for name, call in calls_by_route(chat, session_id).items():
            [[terminated]] = await fetch(
                database_url,
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid != pg_backend_pid()",
            )
            assert terminated > 0, name
            await call()


def restart(pooler: PgBouncer) -> None:
    pooler.stop()
    pooler.start()


def kill(pooler: PgBouncer) -> None:
    pooler.kill()
    pooler.start()


@pytest.mark.case(n=23)
@pytest.mark.parametrize("break_pooler", [restart, kill], ids=["restarted", "killed"])
@pytest.mark.timeout(300)
async def test_no_append_is_lost_when_the_pooler_ends_under_load(
    pooler: PgBouncer, pooled_url: str, database_url: str, break_pooler: Callable[[PgBouncer], None]
) -> None:
    async with under_load(pooled_url) as (server, load):
        for _ in range(6):
            await load.wait_for_appends(100)
            await asyncio.to_thread(break_pooler, pooler)
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
        assert not any(call.done() for call in calls), calls
        await asyncio.to_thread(pooler.start)
        await asyncio.gather(*calls)
        assert (await read_valid_history(database_url, chat.user_id, session_id)).last_seq == 2


# --- Migrations.


@pytest.fixture(params=["pooler", "direct"])
def served_url(request: pytest.FixtureRequest, database_url: str) -> str:
    """Provide the service's connection string: through the pooler, or direct.

    With a direct connection statements are prepared and kept.
    """
    if request.param == "direct":
        return database_url
    url: str = request.getfixturevalue("pooled_url")
    return url


EXPAND = (
    "ALTER TABLE chat_messages ADD COLUMN later_{n} text NOT NULL DEFAULT ''",
    "ALTER TABLE chat_sessions ADD COLUMN later_{n} jsonb",
    # These change the types of results, for which PostgreSQL rejects statements prepared earlier.
    "ALTER TABLE chat_sessions ALTER COLUMN title TYPE varchar({size})",
    "ALTER TABLE chat_messages ALTER COLUMN content TYPE {text}",
)


def _statement(number: int, sql: str) -> Callable[[Connection], None]:
    statement = text(sql.format(n=number, size=1000 + number, text=("text", "varchar")[number % 2]))

    def work(connection: Connection) -> None:
        connection.execute(statement)

    return work


async def _call_until_stopped(chat: Chat, session_id: str, stopping: asyncio.Event) -> int:
    """Call on every route in rounds until the event is set; return the rounds. No call may fail."""
    rounds = 0
    while not stopping.is_set():
        await asyncio.gather(*(call() for call in calls_by_route(chat, session_id).values()))
        rounds += 1
    return rounds


async def _migrate_under_calls(
    url: str, database_url: str, migrate: Callable[[], Awaitable[None]]
) -> None:
    """Migrate while clients call on every route; no call may fail, so that none needs a retry."""
    stopping = asyncio.Event()
    # A timeout as long as the service's own, so that no deadline hides or causes an error.
    async with (
        under_load(url, call_timeout_s=30) as (server, load),
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_ids = [await chat.start() for _ in range(6)]
        calling = [
            asyncio.create_task(_call_until_stopped(chat, session_id, stopping))
            for session_id in session_ids
        ]
        try:
            await load.wait_for_appends(100)
            await migrate()
            await load.wait_for_appends(100)
        finally:
            stopping.set()
            rounds = await asyncio.gather(*calling)
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


LOCK_WAIT = "other transactions hold the locks"
"""In the line that `migrate` prints when it could not take its locks and waits before a retry."""


@pytest.mark.case(n=22)
@pytest.mark.timeout(300)
async def test_rolling_update_causes_no_client_errors(
    served_url: str, database_url: str, tmp_path: Path
) -> None:
    """Migrate, then replace the replicas, as docs/how-to/migrations.md describes.

    Users of the client library append, read and follow all the time. Another transaction holds a
    lock for longer than the migration waits for it, and the migration then blocks all calls for a
    second.
    """
    build = NextBuild(
        tmp_path / "next",
        "ALTER TABLE chat_messages ADD COLUMN later text NOT NULL DEFAULT ''",
        "SELECT pg_sleep(1)",
    )
    async with AsyncExitStack() as exits:

        async def start(name: str, *, ready: bool = True, **options: Any) -> ServerProcess:
            process = ServerProcess(
                served_url, tmp_path / name, CHAT_HISTORY_SHUTDOWN_GRACE="30", **options
            )
            exits.push_async_callback(process.stop)
            return await process.start(ready=ready)

        old = [await start(f"old {n}") for n in range(2)]
        client = await exits.enter_async_context(
            client_of("ipv4:" + ",".join(replica.address for replica in old))
        )
        async with conversations(client, count=6) as records:
            early = await start("early", ready=False, command=build.server_command)
            serving_early = asyncio.create_task(early.wait_ready())
            await asyncio.sleep(1)
            async with connected_to(database_url) as holder:
                await holder.execute("BEGIN; LOCK TABLE chat_messages IN ACCESS SHARE MODE")
                is_waiting = asyncio.Event()
                migrating = asyncio.create_task(
                    build.migrate(
                        served_url, lambda line: is_waiting.set() if LOCK_WAIT in line else None
                    )
                )
                await asyncio.wait(
                    [asyncio.create_task(is_waiting.wait()), migrating],
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
    for record in records:
        assert (
            judge(record, await read_history(database_url, record.user_id, record.session_id)) == []
        )
        assert record.acknowledged > 20
    print(f"{sum(record.acknowledged for record in records)} messages")
