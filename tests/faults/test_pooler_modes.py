"""How the service finds out what is between it and PostgreSQL, without names that say so."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Generator

import pytest
from sqlalchemy import make_url

from service import doctor
from service.server import Server
from service.store.db.connector import Connector
from service.store.db.db_errors import WrongRole
from service.store.db.dsn import Route, Target, parse
from service.store.db.engine import find_target_route, single_use_engine
from service.store.schema import migrations
from service.store.schema.location import UnusableDatabase
from tests.faults.conftest import calls_by_route
from tests.support import pgbouncer
from tests.support.chat import Chat
from tests.support.cluster import Cluster, fetch
from tests.support.history import read_valid_history
from tests.support.pgbouncer import PgBouncer
from tests.support.replicated_postgres import DATABASE, ReplicatedPostgres
from tests.support.servers import connected, serving, settings
from tests.support.statements import database_name
from tests.support.tools import skip_or_fail

ENOUGH = 20.0
"""Seconds to wait for what is promised within a few: a shared machine may pause for some."""


def start_pooler(cluster: Cluster, mode: str, **values: str) -> PgBouncer:
    if pgbouncer.find_program() is None:
        skip_or_fail("pgbouncer is not installed")
    return PgBouncer(
        cluster.url("postgres"), {"pool_mode": mode, "default_pool_size": "40"} | values
    )


def undeclared_url(pooler: PgBouncer, database_url: str) -> str:
    """Return a connection string in which nothing shows that there is a pooler."""
    url = make_url(pooler.url(database_name(database_url)))
    return url.difference_update_query(["pgbouncer"]).render_as_string(hide_password=False)


def undeclared(pooler: PgBouncer, database_url: str) -> Target:
    return parse(undeclared_url(pooler, database_url))


async def route_of(target: Target) -> Target:
    return await find_target_route(target, connect_timeout_s=10)


async def call_on_every_route(server: Server, database_url: str) -> None:
    """Call concurrently on every route to the database; no call may fail or be lost."""
    async with connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_ids = [await chat.start() for _ in range(4)]
        for _ in range(5):
            await asyncio.gather(
                *(
                    call()
                    for session_id in session_ids
                    for call in calls_by_route(chat, session_id).values()
                )
            )
    for session_id in session_ids:
        assert (await read_valid_history(database_url, chat.user_id, session_id)).last_seq == 6


# --- What is found.


async def test_direct_connection_is_recognized_and_prepares_statements(
    cluster: Cluster, database_url: str
) -> None:
    target = await route_of(parse(database_url))
    assert target.route is Route.DIRECT, target.evidence
    assert target.prepared_statements
    async with serving(parse(database_url)) as server:
        assert server.database.connector.route is Route.DIRECT
        assert not server.database.is_pooled


@pytest.mark.case(n=514)
@pytest.mark.parametrize(
    ("mode", "route"), [("session", Route.SESSION), ("transaction", Route.TRANSACTION)]
)
async def test_pool_mode_is_found_by_behaviour(
    cluster: Cluster, database_url: str, mode: str, route: Route
) -> None:
    with start_pooler(cluster, mode) as pooler:
        target = undeclared(pooler, database_url)
        assert target.route is None
        log_offset = cluster.postgres.log.stat().st_size
        async with serving(target) as server:
            connector = server.database.connector
            assert connector.route is route, connector.evidence
            await call_on_every_route(server, database_url)
    with cluster.postgres.log.open("rb") as log:
        log.seek(log_offset)
        names = set(re.findall(r"LOG:  execute ([^:\n]+):", log.read().decode()))
    # The probe prepares no statement by name, and the service does if the process is its own.
    assert (names == {"<unnamed>"}) is (route is Route.TRANSACTION), names


@pytest.mark.case(n=514)
async def test_transaction_mode_is_found_while_others_use_the_pooler(
    cluster: Cluster, database_url: str
) -> None:
    """The server processes of the pooler are in use, so that each transaction gets another one."""
    with start_pooler(cluster, "transaction", default_pool_size="3") as pooler:
        async with serving(parse(pooler.url(database_name(database_url)))) as busy:
            calling = asyncio.create_task(_call_until_cancelled(busy))
            try:
                for _ in range(20):
                    target = await route_of(undeclared(pooler, database_url))
                    assert target.route is Route.TRANSACTION, target.evidence
                assert not calling.done()
            finally:
                calling.cancel()
                await asyncio.wait([calling])


async def _call_until_cancelled(server: Server) -> None:
    async with connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        while True:
            await asyncio.gather(*(call() for call in calls_by_route(chat, session_id).values()))


@pytest.mark.case(n=514)
async def test_session_pool_without_a_free_process_counts_as_transaction_mode(
    cluster: Cluster, database_url: str
) -> None:
    """The second connection of the probe waits, so that nothing is proven. All calls work."""
    with start_pooler(cluster, "session", default_pool_size="1") as pooler:
        target = await route_of(undeclared(pooler, database_url))
        assert target.route is Route.TRANSACTION
        assert "not served" in target.evidence


@pytest.mark.case(n=514)
async def test_statement_mode_is_refused_with_what_to_do(
    cluster: Cluster, database_url: str
) -> None:
    with start_pooler(cluster, "statement") as pooler:
        target = undeclared(pooler, database_url)
        with pytest.raises(UnusableDatabase, match="pool_mode = transaction") as caught:
            await route_of(target)
        assert "set pool_mode = transaction" in doctor.explain(caught.value, target)
        server = Server(settings(), target)
        await server.start()
        try:
            async with asyncio.timeout(ENOUGH):
                while "statement mode" not in str(server.readiness.problems):
                    await asyncio.sleep(0.05)
            assert not server.readiness.is_ready
        finally:
            await server.stop()


@pytest.mark.case(n=514)
async def test_option_that_a_pooler_does_not_take_is_an_error(
    cluster: Cluster, database_url: str
) -> None:
    """It would be lost without a word otherwise."""
    with start_pooler(cluster, "transaction") as pooler:
        url = f"{undeclared_url(pooler, database_url)}&options=-c%20statement_timeout%3D5s"
        with pytest.raises(UnusableDatabase, match=r"statement_timeout .* ALTER ROLE"):
            await route_of(parse(url))
    direct = f"{database_url}&options=-c%20statement_timeout%3D5s"
    assert (await route_of(parse(direct))).route is Route.DIRECT


@pytest.mark.case(n=514)
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("session", "keeps a process of the server for each connection (another process answers"),
        ("transaction", "through a transaction pooler (connections share the processes"),
    ],
)
async def test_check_says_which_route_it_found_and_how(
    cluster: Cluster, database_url: str, mode: str, message: str
) -> None:
    with start_pooler(cluster, mode) as pooler:
        target = undeclared(pooler, database_url)
        target = await route_of(target)
        description = await doctor.describe(target, 10.0)
    findings = doctor.diagnose(description, target, doctor.Pool(8, 4, 240, 12))
    [finding] = [finding for finding in findings if finding.subject == "connection"]
    assert message in finding.message
    assert finding.verdict is doctor.Verdict.OK


# --- Settings.


@pytest.mark.case(n=514)
async def test_setting_overrides_what_would_be_found(cluster: Cluster, database_url: str) -> None:
    target = parse(database_url, prepared_statements="off")
    assert (await route_of(target)).route is Route.TRANSACTION
    async with serving(target) as server:
        assert server.database.is_pooled
        await call_on_every_route(server, database_url)


@pytest.mark.case(n=514)
async def test_unrecognized_pooler_is_found_by_the_statements_that_it_loses(
    cluster: Cluster, database_url: str
) -> None:
    """Statements are prepared by name on a pooler that loses them. No call fails."""
    with start_pooler(cluster, "transaction", default_pool_size="3") as pooler:
        target = undeclared(pooler, database_url)
        mistaken = target.with_route(Route.SESSION, "a mistake")
        async with serving(target) as server:
            connector = server.database.connector
            connector._routed = mistaken
            server.database.is_pooled = False
            server.database.start_generation()
            await call_on_every_route(server, database_url)
            assert connector.route is Route.TRANSACTION
            assert server.database.is_pooled


async def test_names_of_statements_are_those_of_one_process(database_url: str) -> None:
    """A pooler that was not recognized must not find another process's statement by its name."""
    async with serving(database_url) as server:
        hot = await server.database.hot_pool.acquire()
        try:
            await hot.driver.fetch("SELECT 1 AS named")
            rows = await hot.driver.fetch("SELECT name FROM pg_prepared_statements")
        finally:
            server.database.hot_pool.release(hot)
    assert rows
    assert all(re.fullmatch(r"chat_[0-9a-f]{8}__asyncpg_\w+", row["name"]) for row in rows), rows


async def test_waits_for_locks_are_limited_through_a_session_pooler(
    cluster: Cluster, database_url: str
) -> None:
    """The pooler rejects the start-up parameter, so it is set later."""
    with start_pooler(cluster, "session") as pooler:
        async with serving(undeclared(pooler, database_url)) as server:
            hot = await server.database.hot_pool.acquire()
            try:
                assert (await hot.driver.fetch("SHOW lock_timeout"))[0][0] == "200ms"
            finally:
                server.database.hot_pool.release(hot)


async def test_migration_runs_through_a_pooler_that_nothing_declares(
    cluster: Cluster, empty_database_url: str
) -> None:
    with start_pooler(cluster, "transaction") as pooler:
        migration = await migrations.upgrade(undeclared(pooler, empty_database_url))
        assert migration.after > 0
        again = await migrations.upgrade(undeclared(pooler, empty_database_url))
        assert again.before == migration.after


# --- A failover behind the pooler.


@pytest.fixture
def demoted(cluster: Cluster) -> Generator[tuple[ReplicatedPostgres, PgBouncer]]:
    """Provide a primary with a standby, and a pooler in front of the standby."""
    if pgbouncer.find_program() is None:
        skip_or_fail("pgbouncer is not installed")
    with ReplicatedPostgres() as pair:
        asyncio.run(migrations.upgrade(parse(pair.nodes[0].url)))
        with PgBouncer(
            pair.nodes[0].url, {"default_pool_size": "4"}, databases=(DATABASE,)
        ) as pooler:
            yield pair, pooler


@pytest.mark.case(n=501)
async def test_reads_through_a_pooler_are_never_those_of_a_demoted_server(
    demoted: tuple[ReplicatedPostgres, PgBouncer],
) -> None:
    """The pooler leads to the old primary, which is a standby that receives nothing.

    No read may succeed there: it would not return what the new primary has acknowledged. When the
    pooler leads to the new primary, reads and writes work without a restart.
    """
    pair, pooler = demoted
    old, new = pair.nodes
    target = parse(pooler.url(DATABASE))
    async with serving(target) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        pair.switch_over(old, new)
        await fetch(
            new.url, "UPDATE chathistory.chat_sessions SET title = 'acknowledged by the new one'"
        )
        calls = {
            name: asyncio.ensure_future(call())
            for name, call in calls_by_route(chat, session_id).items()
        }
        done, _ = await asyncio.wait(calls.values(), timeout=3)
        successes = [task for task in done if task.exception() is None]
        assert not successes, "a standby has answered"
        pooler.redirect(new.url)
        await asyncio.gather(*calls.values(), return_exceptions=True)
        async with asyncio.timeout(ENOUGH):
            while not server.readiness.is_ready:
                await asyncio.sleep(0.05)
        assert (await chat.get_session(session_id)).title in ("acknowledged by the new one", "new")
        await chat.append(session_id, "more")


async def test_standby_behind_a_pooler_replaces_all_connections(database_url: str) -> None:
    """One call that meets a standby shows that the other connections may lead to it, too."""
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await chat.page(session_id)
        database = server.database
        idle = [connection.driver for connection in database.hot_pool._idle]
        assert idle
        database.retries.report(WrongRole("a standby"))
        async with asyncio.timeout(ENOUGH):
            while not all(driver.is_closed() for driver in idle):
                await asyncio.sleep(0.02)
        # The prober replaces them when the server is writable again, and not each call.
        number = database._generation.number
        database._generation_started_at = -math.inf
        database.prober.is_read_only = True
        database.retries.report(WrongRole("a standby"))
        assert database._generation.number == number
        database.prober.is_read_only = False


async def test_reads_do_not_override_a_read_only_database(
    cluster: Cluster, database_url: str
) -> None:
    """Writes through a pooler keep `default_transaction_read_only`, and reads go on."""
    name, admin = database_name(database_url), cluster.url("postgres")
    terminate = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    with start_pooler(cluster, "transaction") as pooler:
        target = parse(pooler.url(name))
        async with serving(target) as server, connected(server.address) as stub:
            chat = await Chat.of_new_user(stub)
            session_id = await chat.start()
            await fetch(admin, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            await fetch(admin, terminate)
            try:
                write = asyncio.ensure_future(chat.append(session_id, "more"))
                for _ in range(4):
                    assert len((await chat.page(session_id)).messages) == 1
                    await chat.get_session(session_id)
                assert not write.done(), "a write was answered while the database was read-only"
            finally:
                await fetch(admin, f"ALTER DATABASE {name} RESET default_transaction_read_only")
            await fetch(admin, terminate)  # The pooler keeps the sessions that are read-only.
            await write
            assert len((await chat.page(session_id)).messages) == 2


async def test_single_use_connection_follows_the_route(cluster: Cluster, database_url: str) -> None:
    """As of `migrate`: nothing is prepared by name through a transaction pooler."""
    with start_pooler(cluster, "transaction") as pooler:
        engine = single_use_engine(undeclared(pooler, database_url), connect_timeout_s=10)
        try:
            async with engine.connect() as connection:
                driver = (await connection.get_raw_connection()).driver_connection
                assert driver is not None
                await connection.exec_driver_sql("SELECT 1")
                names = await connection.exec_driver_sql("SELECT name FROM pg_prepared_statements")
                assert names.all() == []
        finally:
            await engine.dispose()


def test_connector_has_no_route_before_it_connects() -> None:
    assert Connector(parse("postgresql://u@db.internal:6543/d")).route is None
