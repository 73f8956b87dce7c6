"""Several servers, of which one is the primary: the service finds it, and follows a failover."""

from __future__ import annotations

import asyncio
from collections.abc import Generator

import pytest
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub as Stub

from service import doctor
from service.store.db import retries
from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.rpc.test_health import NOT_SERVING, SERVING, started
from tests.support import failures
from tests.support.chat import Chat
from tests.support.cluster import Cluster, fetch
from tests.support.load import Load, fast_reconnect_options
from tests.support.ports import UNUSED_ADDRESS
from tests.support.proxy import Proxy
from tests.support.replicated_postgres import Node, ReplicatedPostgres
from tests.support.servers import channel, connected, serving
from tests.support.statements import database_name

OK = doctor.Verdict.OK
ENOUGH = 20.0
"""Seconds to wait for what is promised within five: a shared machine may pause for some."""
SET_READ_ONLY = "ALTER DATABASE {name} SET default_transaction_read_only = on"
RESET_READ_ONLY = "ALTER DATABASE {name} RESET default_transaction_read_only"
TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
FORMS = (
    "postgresql://postgres@{0},{1}/postgres?sslmode=disable",
    "postgresql://postgres@{0},{1}/postgres?sslmode=disable&target_session_attrs=read-write",
    "postgresql://postgres@/postgres?host={0}&host={1}&sslmode=disable",
    "postgresql://postgres@/postgres?host=127.0.0.1,127.0.0.1&port={2},{3}&sslmode=disable",
    "host=127.0.0.1,127.0.0.1 port={2},{3} user=postgres dbname=postgres sslmode=disable",
)


@pytest.fixture
def pair(cluster: Cluster) -> Generator[ReplicatedPostgres]:
    """Provide a primary and a standby, with a migrated schema."""
    with ReplicatedPostgres() as pair:
        asyncio.run(migrations.upgrade(parse(pair.nodes[0].url)))
        yield pair


async def configure(node: Node, name: str, value: str) -> None:
    """Set a parameter of a node, and wait until its new sessions have it."""
    await fetch(node.url, f"ALTER SYSTEM SET {name} = '{value}'")
    await fetch(node.url, "SELECT pg_reload_conf()")
    async with asyncio.timeout(ENOUGH):
        while (await fetch(node.url, f"SHOW {name}"))[0][0] != value:
            await asyncio.sleep(0.02)


# --- Sessions that are read-only.


@pytest.mark.case(n=501)
async def test_read_only_sessions_are_closed_by_the_first_write_that_they_reject(
    cluster: Cluster, database_url: str
) -> None:
    """Sessions that began during the outage would be read-only until they end. No call fails."""
    name, admin = database_name(database_url), cluster.url("postgres")
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await fetch(admin, SET_READ_ONLY.format(name=name))
        await fetch(admin, TERMINATE.format(name=name))
        await asyncio.gather(*(chat.page(session_id) for _ in range(8)))
        await asyncio.gather(*(chat.get_session(session_id) for _ in range(4)))
        await fetch(admin, RESET_READ_ONLY.format(name=name))
        for number in range(8):
            await chat.append(session_id, "more")
            await chat.update_session(["title"], id=session_id, title=f"title {number}")


@pytest.mark.case(n=501)
async def test_read_only_database_is_an_outage_and_calls_succeed_when_it_ends(
    cluster: Cluster, database_url: str
) -> None:
    """Appends and transactions wait, and reads go on."""
    name, admin = database_name(database_url), cluster.url("postgres")
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await fetch(admin, SET_READ_ONLY.format(name=name))
        await fetch(admin, TERMINATE.format(name=name))
        writes = [
            asyncio.ensure_future(chat.append(session_id, "more")),
            asyncio.ensure_future(chat.update_session(["title"], id=session_id, title="new")),
        ]
        for _ in range(4):
            done, _ = await asyncio.wait(writes, timeout=0.5)
            assert not done, "a write was answered while the database was read-only"
            assert len((await chat.page(session_id)).messages) == 1
            await chat.context(session_id)
        await fetch(admin, RESET_READ_ONLY.format(name=name))
        await asyncio.gather(*writes)
        assert len((await chat.page(session_id)).messages) == 2


# --- Several servers.


@pytest.mark.case(n=502)
async def test_every_form_of_several_hosts_reaches_the_primary(pair: ReplicatedPostgres) -> None:
    """Whichever of the hosts is named first."""
    for form in FORMS:
        for first, second in (pair.nodes, pair.nodes[::-1]):
            url = form.format(first.address, second.address, first.port, second.port)
            async with serving(parse(url)) as server, connected(server.address) as stub:
                await (await Chat.of_new_user(stub)).start()


@pytest.mark.case(n=502)
@pytest.mark.case(n=501)
async def test_service_follows_a_switchover_without_a_restart(pair: ReplicatedPostgres) -> None:
    """The load repeats only what its clients may repeat, and finds every acknowledged message."""
    first, second = pair.nodes
    async with (
        serving(parse(pair.url(target_session_attrs="read-write"))) as server,
        channel(server.address, **fast_reconnect_options()) as opened,
    ):
        load = Load(await Chat.of_new_user(Stub(opened)))
        async with load.running():
            for old, new in ((first, second), (second, first), (first, second)):
                await load.wait_for_appends(60)
                await asyncio.to_thread(pair.switch_over, old, new)
            await load.wait_for_appends(60)
        await load.check(second.url)


@pytest.mark.case(n=502)
async def test_kill_of_the_primary_loses_nothing_when_replication_is_synchronous(
    pair: ReplicatedPostgres,
) -> None:
    first, second = pair.nodes
    await configure(first, "synchronous_standby_names", second.name)
    async with (
        serving(parse(pair.url())) as server,
        channel(server.address, **fast_reconnect_options()) as opened,
    ):
        load = Load(await Chat.of_new_user(Stub(opened)))
        async with load.running():
            await load.wait_for_appends(60)
            await asyncio.to_thread(first.kill)
            await asyncio.to_thread(second.promote)
            await load.wait_for_appends(60)
        await load.check(second.url)


@pytest.mark.case(n=502)
async def test_host_that_does_not_answer_is_tried_last(pair: ReplicatedPostgres) -> None:
    """The first host accepts connections and never answers; it may use a probe's time up once."""
    async with Proxy(pair.nodes[0].address) as silent:
        silent.block()
        url = pair.url().replace("@", f"@{silent.address},", 1)
        async with serving(parse(url)) as server, connected(server.address) as stub:
            chat = await Chat.of_new_user(stub)
            session_id = await chat.start()
            accepted = silent.accepted
            assert accepted > 0, "it was tried"
            server.database.start_generation()
            await chat.append(session_id, "more")
            await chat.get_session(session_id)
            assert silent.accepted == accepted, "it was tried before a host that answers"


@pytest.mark.case(n=502)
@pytest.mark.parametrize("attrs", ["any", "primary", "read-write"])
async def test_read_only_primary_serves_reads_unless_the_url_requires_writes(
    pair: ReplicatedPostgres, attrs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = pair.nodes[0]
    target = parse(pair.url(target_session_attrs=attrs))
    async with serving(target) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await configure(primary, "default_transaction_read_only", "on")
        server.database.start_generation()
        if attrs == "read-write":
            with monkeypatch.context() as patch:
                patch.setattr(retries, "OUTAGE_TIMEOUT_S", 0.5)
                await failures.assert_fails(chat.page(session_id), "DATABASE_UNAVAILABLE")
        else:
            assert len((await chat.page(session_id)).messages) == 1
        await configure(primary, "default_transaction_read_only", "off")
        await chat.append(session_id, "more")


@pytest.mark.case(n=502)
async def test_check_lists_each_server_with_the_reason_why_it_cannot_be_used(
    pair: ReplicatedPostgres,
) -> None:
    standby = pair.nodes[1]
    target = parse(standby.url.replace("@", f"@{UNUSED_ADDRESS},", 1))
    with pytest.raises(DATABASE_ERRORS) as caught:
        await doctor.describe(target, 5.0)
    explanation = doctor.explain(caught.value, target)
    assert f"{UNUSED_ADDRESS}: ConnectionRefusedError" in explanation
    assert f"{standby.address}: a standby" in explanation


@pytest.mark.case(n=502)
async def test_check_reports_the_role_of_each_server(pair: ReplicatedPostgres) -> None:
    """Two primaries, such as after a failover without fencing, are reported as one fault."""
    primary, standby = pair.nodes
    target = parse(pair.url())
    findings = doctor.check_hosts(await doctor.describe_hosts(target, 5.0))
    assert [(finding.subject, finding.verdict) for finding in findings] == [("server", OK)] * 2
    assert findings[0].message.startswith(f"{primary.address}: writable")
    assert findings[1].message.startswith(f"{standby.address}: a standby")
    assert await doctor.describe_hosts(parse(primary.url), 5.0) == []
    # Two addresses of one server are no two primaries.
    port = primary.port
    same = parse(f"postgresql://postgres@127.0.0.1:{port},localhost:{port}/postgres")
    findings = doctor.check_hosts(await doctor.describe_hosts(same, 5.0))
    assert [finding.verdict for finding in findings if "writable" in finding.message]
    assert "servers" not in {finding.subject for finding in findings}
    await configure(primary, "default_transaction_read_only", "on")
    findings = doctor.check_hosts(await doctor.describe_hosts(target, 5.0))
    assert [finding.verdict for finding in findings] == [doctor.Verdict.NOTE, OK]
    assert "sessions are read-only" in findings[0].message
    await configure(primary, "default_transaction_read_only", "off")
    await asyncio.to_thread(standby.promote)
    findings = doctor.check_hosts(await doctor.describe_hosts(target, 5.0))
    [finding] = [finding for finding in findings if finding.subject == "servers"]
    assert finding.verdict is doctor.Verdict.TODO
    assert f"{primary.address}, {standby.address} are several primaries" in finding.message


# --- A standby alone.


@pytest.mark.case(n=503)
async def test_standby_is_neither_served_nor_migrated(pair: ReplicatedPostgres) -> None:
    standby = pair.nodes[1]
    for target in (parse(standby.url), parse(standby.url, prepared_statements="off")):
        with pytest.raises(migrations.MigrationError, match="is a standby: migrate the primary"):
            await migrations.upgrade(target)
    with pytest.raises(DATABASE_ERRORS) as caught:
        await doctor.describe(parse(standby.url), 5.0)
    assert "is a standby: connect to the primary" in doctor.explain(
        caught.value, parse(standby.url)
    )
    async with started(standby.url) as (server, probe):
        async with asyncio.timeout(ENOUGH):
            while "a standby" not in server.readiness.problem:
                await asyncio.sleep(0.02)
        assert not await probe.ready()
        assert await probe.check("database") == NOT_SERVING
        assert await probe.check("liveness") == SERVING
        await asyncio.to_thread(pair.nodes[0].stop)
        await asyncio.to_thread(standby.promote)
        await probe.becomes(True)
        async with connected(server.address) as stub:
            await (await Chat.of_new_user(stub)).start()


@pytest.mark.case(n=502)
async def test_migration_of_several_hosts_runs_on_the_primary(pair: ReplicatedPostgres) -> None:
    await migrations.downgrade(parse(pair.nodes[0].url))
    url = f"postgresql://postgres@{pair.nodes[1].address},{pair.nodes[0].address}/postgres"
    result = await migrations.upgrade(parse(f"{url}?sslmode=disable"))
    assert result.before == 0
    assert result.problem is None
