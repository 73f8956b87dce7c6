"""Readiness follows what callers get: of reads and of writes, each on its own.

The database is read-only, full, locked, refuses the service, or loses its schema.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import httpx
import pytest
from chathistory.v1 import message_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub as Stub
from grpc import StatusCode, aio
from sqlalchemy import make_url
from structlog.testing import capture_logs

from service.doctor import Pool, Verdict, describe, diagnose
from service.server import Server
from service.store.db import retries
from service.store.db.dsn import Target, parse
from service.store.schema import migrations, moving
from tests.rpc.test_health import NOT_SERVING, SERVING, Probe, started
from tests.support import commit_faults, failures, pgbouncer, tls_postgres
from tests.support.certificates import CertificateAuthority
from tests.support.chat import Chat, new_messages
from tests.support.cluster import TESTS_APPLICATION, Cluster, connected_to, fetch
from tests.support.load import Load, fast_reconnect_options
from tests.support.pgbouncer import PgBouncer
from tests.support.roles import Role, service_role
from tests.support.servers import channel, serving
from tests.support.statements import SentStatements, database_name
from tests.support.tls_postgres import TlsPostgres
from tests.support.tools import skip_or_fail
from tests.support.waits import until

UNAVAILABLE = {(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")}
ENOUGH = 30.0
"""Seconds to wait for what is promised within five: a shared machine may pause for some."""
SET_READ_ONLY = "ALTER DATABASE {name} SET default_transaction_read_only = on"
RESET_READ_ONLY = "ALTER DATABASE {name} RESET default_transaction_read_only"
TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"


@pytest.fixture(autouse=True)
def long_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer calls a second before their deadlines: a busy machine may deliver a reply late."""
    monkeypatch.setattr(retries, "REPLY_MARGIN_S", 1.0)


class Service(NamedTuple):
    """A server, its health, and a session of a user."""

    server: Server
    probe: Probe
    chat: Chat
    session_id: str

    async def becomes(self, *, reads: bool, writes: bool) -> None:
        """Wait until each half has this status, and with them the names for both."""
        wanted = [SERVING if is_up else NOT_SERVING for is_up in (reads, writes, reads and writes)]
        async with asyncio.timeout(ENOUGH):
            while wanted != [await self.probe.check(name) for name in ("reads", "writes", "")]:
                assert await self.probe.check("liveness") == SERVING
                await asyncio.sleep(0.05)

    @property
    def problem(self) -> str:
        return self.server.readiness.problem


@asynccontextmanager
async def started_service(url: str | Target, **settings: Any) -> AsyncGenerator[Service]:
    async with (
        serving(url, **settings) as server,
        channel(server.address, **fast_reconnect_options()) as opened,
    ):
        chat = await Chat.of_new_user(Stub(opened))
        yield Service(server, Probe(opened), chat, await chat.start())


@asynccontextmanager
async def repeated(call: Callable[[], Awaitable[object]]) -> AsyncGenerator[list[aio.AioRpcError]]:
    """Repeat a call in four tasks; provide the errors."""
    errors: list[aio.AioRpcError] = []

    async def run() -> None:
        while True:
            try:
                await call()
            except aio.AioRpcError as error:
                errors.append(error)
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(run()) for _ in range(4)]
    try:
        yield errors
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def appends(service: Service) -> Callable[[], Awaitable[object]]:
    """Return a call that appends one message, with a deadline of four seconds."""
    return lambda: service.chat.stub.AppendMessages(
        message_pb2.AppendMessagesRequest(
            user_id=service.chat.user_id,
            session_id=service.session_id,
            messages=new_messages(1),
        ),
        timeout=4,
    )


def reasons(errors: list[aio.AioRpcError]) -> set[tuple[StatusCode, str]]:
    """Return the codes and reasons of errors; `read_failure` checks that each has a reason."""
    return {(error.code(), failures.read_failure(error).reason) for error in errors}


async def metrics_of(server: Server) -> dict[str, float]:
    """Return the gauges of readiness by name, without their common prefix."""
    assert server.metrics is not None
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"http://127.0.0.1:{server.metrics.port}/metrics")).text
    lines = (line.rpartition(" ") for line in text.splitlines() if line[:1] != "#")
    prefix = "chat_history_"
    return {
        name.removeprefix(prefix): float(value)
        for name, _, value in lines
        if name.startswith(prefix) and name.endswith(("ready", "locked"))
    }


# --- Read-only.


@pytest.mark.case(n=501)
async def test_read_only_database_is_not_ready_for_writes_and_serves_reads(
    cluster: Cluster, database_url: str
) -> None:
    name, admin = database_name(database_url), cluster.url("postgres")
    async with started_service(database_url, metrics_listen="127.0.0.1:0") as service:
        with capture_logs() as events:
            async with repeated(appends(service)) as errors:
                await fetch(admin, SET_READ_ONLY.format(name=name))
                await fetch(admin, TERMINATE.format(name=name))
                await service.becomes(reads=True, writes=False)
                assert "25006" in service.problem
                assert await service.probe.check("database") == NOT_SERVING
                gauges = await metrics_of(service.server)
                assert (gauges["ready"], gauges["reads_ready"], gauges["writes_ready"]) == (0, 1, 0)
                await service.chat.page(service.session_id)
                await service.chat.context(service.session_id)
                await until(lambda: len(errors) >= 4)
                await fetch(admin, RESET_READ_ONLY.format(name=name))
                await service.becomes(reads=True, writes=True)
            assert reasons(errors) == UNAVAILABLE
            await service.chat.append(service.session_id, "after")
        changes = [event for event in events if event["event"] in ("ready", "not ready")]
        assert changes[-1]["event"] == "ready"
        assert changes[-2]["reads"] == "work"
        assert "25006" in changes[-2]["writes"]
        assert all(before != after for before, after in pairwise(changes))
        assert (await metrics_of(service.server))["writes_ready"] == 1


async def test_read_only_database_without_calls_becomes_ready_when_it_is_writable(
    cluster: Cluster, database_url: str
) -> None:
    """A replica that is not ready gets no calls, and its pool holds read-only connections."""
    name, admin = database_name(database_url), cluster.url("postgres")
    async with started_service(database_url) as service:
        await fetch(admin, SET_READ_ONLY.format(name=name))
        await fetch(admin, TERMINATE.format(name=name))
        await asyncio.gather(*(service.chat.page(service.session_id) for _ in range(8)))
        await asyncio.gather(*(service.chat.get_session(service.session_id) for _ in range(4)))
        assert await service.probe.check("database") == NOT_SERVING
        await service.becomes(reads=True, writes=False)
        await fetch(admin, RESET_READ_ONLY.format(name=name))
        await service.becomes(reads=True, writes=True)
        sent = SentStatements(cluster, database_url)
        await service.chat.append(service.session_id, "more")
        assert len([logged for logged in sent.so_far() if "INSERT" in logged.sql]) == 1


async def test_missing_synchronous_standby_is_an_outage_of_writes(own_cluster: Cluster) -> None:
    """Commits wait for a standby that does not exist; reads do not."""
    await own_cluster.prepare()
    url = own_cluster.url(await own_cluster.create_database())
    async with started_service(url) as service, repeated(appends(service)):
        await fetch(url, "ALTER SYSTEM SET synchronous_standby_names = 's1'")
        await fetch(url, "SELECT pg_reload_conf()")
        try:
            await service.becomes(reads=True, writes=False)
            assert "standby" in service.problem
            await service.chat.page(service.session_id)
            target = parse(url)
            findings = diagnose(await describe(target, 5.0), target, Pool(8, 4, 240, 12))
            [finding] = [finding for finding in findings if finding.subject == "writes"]
            assert finding.verdict is Verdict.TODO
            assert "synchronous_standby_names" in finding.message
        finally:
            await fetch(url, "ALTER SYSTEM RESET synchronous_standby_names")
            await fetch(url, "SELECT pg_reload_conf()")
        await service.becomes(reads=True, writes=True)


# --- No space.


@pytest.mark.case(n=505)
async def test_full_disk_is_an_outage_of_writes(database_url: str) -> None:
    """A trigger raises the error: a full disk needs a disk of its own."""
    await commit_faults.install(database_url)
    async with started_service(database_url) as service:
        with capture_logs() as events:
            async with repeated(appends(service)) as errors:
                await commit_faults.arm(database_url, "53100", 1_000)
                await service.becomes(reads=True, writes=False)
                assert "disk is full" in service.problem
                assert "53100" in service.problem
                await service.chat.page(service.session_id)
                await until(lambda: len(errors) >= 4)
                await commit_faults.arm(database_url, "53100", 0)
                await service.becomes(reads=True, writes=True)
            assert reasons(errors) == UNAVAILABLE
            assert all(failures.read_failure(error).retry_after for error in errors)
        changes = [event for event in events if event["event"] in ("ready", "not ready")]
        assert [event["event"] for event in changes] == ["not ready", "ready"]
        assert changes[0]["reads"] == "work"
        assert "53100" in changes[0]["writes"]


async def test_probe_proves_space_for_data_after_the_disk_was_full(
    cluster: Cluster, database_url: str
) -> None:
    """The proof is a sort that spills, which `temp_file_limit` refuses as a full disk does."""
    name, admin = database_name(database_url), cluster.url("postgres")
    await commit_faults.install(database_url)
    async with started_service(database_url) as service:
        await commit_faults.arm(database_url, "53100", 1)
        await fetch(admin, f"ALTER DATABASE {name} SET temp_file_limit = '64kB'")
        await service.chat.append(service.session_id, "the disk is full once")
        await service.becomes(reads=True, writes=False)
        assert "53400" in service.problem
        await fetch(admin, f"ALTER DATABASE {name} RESET temp_file_limit")
        await service.becomes(reads=True, writes=True)


# --- The server rejects the role, the database, or the client.


class Rejection(NamedTuple):
    """A reason for which the server rejects connections."""

    state: str
    causes: tuple[str, ...]
    """Statements that bring it about; all sessions are ended after each of them."""
    remedies: tuple[str, ...]


ALLOW = "ALTER DATABASE {name} ALLOW_CONNECTIONS true"
DISALLOW = "ALTER DATABASE {name} ALLOW_CONNECTIONS false"
REJECTIONS = {
    "login": Rejection("28000", ("ALTER ROLE {role} NOLOGIN",), ("ALTER ROLE {role} LOGIN",)),
    "connections": Rejection("55000", (DISALLOW,), (ALLOW,)),
    "privilege": Rejection(
        "42501",
        ("REVOKE CONNECT ON DATABASE {name} FROM PUBLIC",),
        ("GRANT CONNECT ON DATABASE {name} TO PUBLIC",),
    ),
    "limit": Rejection(
        "53300",
        ("ALTER ROLE {role} CONNECTION LIMIT 0",),
        ("ALTER ROLE {role} CONNECTION LIMIT -1",),
    ),
    # A database is renamed only while no session is connected.
    "name": Rejection(
        "3D000",
        (DISALLOW, "ALTER DATABASE {name} RENAME TO {name}_other"),
        ("ALTER DATABASE {name}_other RENAME TO {name}", ALLOW),
    ),
}


@pytest.fixture
async def role(database_url: str) -> AsyncGenerator[Role]:
    """Provide a role with the documented rights."""
    async with service_role(database_url) as role:
        yield role


@pytest.mark.case(n=506)
@pytest.mark.parametrize("kind", REJECTIONS)
async def test_rejected_connection_is_an_outage_with_its_cause(
    cluster: Cluster, database_url: str, role: Role, kind: str
) -> None:
    name, admin = database_name(database_url), cluster.url("postgres")
    rejection = REJECTIONS[kind]
    async with started_service(role.url) as service, repeated(appends(service)) as errors:
        for statement in rejection.causes:
            await fetch(admin, statement.format(name=name, role=role.name))
            await fetch(admin, TERMINATE.format(name=name))
        try:
            await service.becomes(reads=False, writes=False)
            await until(lambda: rejection.state in service.problem)
            assert await service.probe.check("database") == NOT_SERVING
            await until(lambda: len(errors) >= 4)
        finally:
            for statement in rejection.remedies:
                await fetch(admin, statement.format(name=name, role=role.name))
        await service.becomes(reads=True, writes=True)
        assert reasons(errors) == UNAVAILABLE


@pytest.mark.case(n=506)
async def test_changed_password_is_an_outage_with_its_cause(cluster: object) -> None:
    if tls_postgres.find_programs() is None:
        skip_or_fail("Debian's postgresql is not installed")
    with TlsPostgres(CertificateAuthority().issue()) as postgres:
        local = f"{postgres.local_url}&sslmode=disable"
        await migrations.upgrade(parse(local))
        change = f"ALTER ROLE {tls_postgres.USER} PASSWORD"
        async with (
            started_service(postgres.url(sslmode="require")) as service,
            repeated(appends(service)) as errors,
        ):
            await fetch(local, f"{change} 'npg_other'")
            await fetch(
                local,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            await service.becomes(reads=False, writes=False)
            assert "28P01" in service.problem
            assert "npg_" not in service.problem
            await until(lambda: len(errors) >= 4)
            await fetch(local, f"{change} '{tls_postgres.PASSWORD}'")
            await service.becomes(reads=True, writes=True)
            assert reasons(errors) == UNAVAILABLE


# --- Rights and the schema.


@pytest.mark.parametrize(
    ("privilege", "are_reads_up"), [("INSERT", True), ("SELECT", False)], ids=str
)
async def test_missing_privilege_is_named_and_found_until_it_is_granted(
    database_url: str, role: Role, privilege: str, are_reads_up: bool
) -> None:
    """The one call that meets it is enough: without further calls it is still known."""
    async with started_service(role.url) as service:
        await fetch(database_url, f"REVOKE {privilege} ON chat_messages FROM {role.name}")
        call = (
            service.chat.append(service.session_id, "denied")
            if privilege == "INSERT"
            else service.chat.page(service.session_id)
        )
        await failures.assert_fails(call, "DATABASE_UNAVAILABLE")
        await service.becomes(reads=are_reads_up, writes=False)
        for _ in range(3):
            await asyncio.sleep(1.0)
            assert f"lacks {privilege} on chathistory.chat_messages" in service.problem
        await fetch(database_url, f"GRANT {privilege} ON chat_messages TO {role.name}")
        await service.becomes(reads=True, writes=True)


async def test_missing_privilege_is_found_in_the_schema_in_use(
    database_url: str, role: Role
) -> None:
    """The default schema has no tables."""
    await moving.move(parse(database_url), "chat_moved")
    async with started_service(role.url) as service:
        await fetch(database_url, f"REVOKE INSERT ON chat_moved.chat_messages FROM {role.name}")
        await failures.assert_fails(
            service.chat.append(service.session_id, "denied"), "DATABASE_UNAVAILABLE"
        )
        await service.becomes(reads=True, writes=False)
        assert "lacks INSERT on chat_moved.chat_messages" in service.problem


@pytest.mark.parametrize("schema", [None, "chathistory"])
async def test_missing_right_to_use_the_schema_is_named(
    database_url: str, role: Role, schema: str | None
) -> None:
    """Also of a schema that the configuration names, which is not looked for."""
    async with started_service(parse(role.url, schema=schema)) as service:
        await fetch(database_url, f"REVOKE USAGE ON SCHEMA chathistory FROM {role.name}")
        await failures.assert_fails(
            service.chat.append(service.session_id, "denied"), "DATABASE_UNAVAILABLE"
        )
        await service.becomes(reads=False, writes=False)
        assert "GRANT USAGE ON SCHEMA chathistory" in service.problem
        await fetch(database_url, f"GRANT USAGE ON SCHEMA chathistory TO {role.name}")
        await service.becomes(reads=True, writes=True)


@pytest.mark.case(n=518)
async def test_service_is_not_ready_when_the_schema_stops_fitting(database_url: str) -> None:
    async with started_service(database_url) as service:
        await migrations.downgrade(parse(database_url), "base")
        await failures.assert_fails(
            service.chat.append(service.session_id, "lost"), "DATABASE_UNAVAILABLE"
        )
        await service.becomes(reads=False, writes=False)
        assert "migrate" in service.problem
        await migrations.upgrade(parse(database_url))
        await service.becomes(reads=True, writes=True)
        await (await Chat.of_new_user(service.chat.stub)).start()


# --- Locked tables.


@pytest.mark.case(n=509)
async def test_calls_on_a_locked_table_get_our_own_status_and_the_holder_is_named(
    database_url: str,
) -> None:
    async with started_service(database_url, metrics_listen="127.0.0.1:0") as service:
        ids: Any = {"user_id": service.chat.user_id, "session_id": service.session_id}
        stub = service.chat.stub
        [message] = (await service.chat.page(service.session_id)).messages
        append = message_pb2.AppendMessagesRequest(**ids, messages=new_messages(1))
        update = message_pb2.UpdateMessageRequest(
            **ids, message=message_pb2.Message(id=message.id, content="new")
        )
        get = message_pb2.GetMessageRequest(**ids, message_id=message.id)
        async with connected_to(database_url) as holder:
            pid = await holder.fetchval("SELECT pg_backend_pid()")
            await holder.execute("BEGIN; LOCK TABLE chat_messages IN ACCESS EXCLUSIVE MODE")
            with capture_logs() as events:
                calls: list[Awaitable[object]] = [
                    stub.AppendMessages(append, timeout=4),
                    stub.UpdateMessage(update, timeout=4),
                    stub.GetMessage(get, timeout=4),
                    stub.ListMessages(message_pb2.ListMessagesRequest(**ids), timeout=4),
                    stub.GetContext(message_pb2.GetContextRequest(**ids), timeout=4),
                ]
                replies = await asyncio.gather(*map(failures.failure_of, calls))
                # The last attempt of a call may be in flight when its time is up.
                assert {failure.reason for failure in replies} <= {
                    "CONTENTION",
                    "DEADLINE_EXCEEDED",
                }
                assert replies[0].reason == "CONTENTION"
                assert (await metrics_of(service.server))["tables_locked"] == 1
            [event] = [event for event in events if event["event"] == "tables locked"]
            assert (event["table"], event["pid"]) == ("chat_messages", pid)
            assert (event["mode"], event["granted"]) == ("AccessExclusiveLock", True)
            assert event["application"] == TESTS_APPLICATION
            await holder.execute("ROLLBACK")
        await stub.AppendMessages(append)
        await service.becomes(reads=True, writes=True)
        await until(lambda: service.server.database.prober.table_lock is None)
        assert (await metrics_of(service.server))["tables_locked"] == 0


@pytest.mark.case(n=509)
async def test_writes_are_not_ready_while_a_locked_table_makes_all_of_them_fail(
    database_url: str,
) -> None:
    """CREATE INDEX blocks writes only."""
    async with started_service(database_url) as service, repeated(appends(service)) as errors:
        async with connected_to(database_url) as holder:
            await holder.execute("BEGIN; CREATE INDEX slow ON chat_messages (role)")
            await service.becomes(reads=True, writes=False)
            assert "chat_messages is locked by process" in service.problem
            await service.chat.page(service.session_id)
            await holder.execute("ROLLBACK")
        await service.becomes(reads=True, writes=True)
    assert reasons(errors) == {(StatusCode.ABORTED, "CONTENTION")}


async def test_pooler_that_rejects_the_lock_timeout_is_served_without_it(
    cluster: Cluster, database_url: str
) -> None:
    """It pools sessions, and nothing in the connection string shows that it is a pooler."""
    if pgbouncer.find_program() is None:
        skip_or_fail("pgbouncer is not installed")
    with PgBouncer(cluster.url("postgres"), {"pool_mode": "session"}) as pooler:
        url = make_url(pooler.url(database_name(database_url)))
        target = parse(
            url.difference_update_query(["pgbouncer"]).render_as_string(hide_password=False)
        )
        assert not target.is_pooled
        async with serving(target) as server, channel(server.address) as opened:
            await (await Chat.of_new_user(Stub(opened))).start()
        assert "unsupported startup parameter: lock_timeout" in pooler.log.read_text()


# --- Too few connections.


@pytest.mark.case(n=520)
async def test_service_is_ready_while_calls_succeed_although_connections_are_rejected(
    cluster: Cluster, role: Role
) -> None:
    """All connections that the role may have serve calls. So they do when the calls end."""
    admin = cluster.url("postgres")
    await fetch(admin, f"ALTER ROLE {role.name} CONNECTION LIMIT 2")
    async with (
        serving(role.url) as server,
        channel(server.address, **fast_reconnect_options()) as opened,
    ):
        probe = Probe(opened)
        load = Load(await Chat.of_new_user(Stub(opened)), sessions=8)
        async with load.running():
            for _ in range(40):
                await load.wait_for_appends(20)
                assert await probe.ready(), server.readiness.problem
        server.readiness.request_probe()
        for _ in range(30):
            assert await probe.ready(), server.readiness.problem
            await asyncio.sleep(0.1)
        assert await probe.check("database") == SERVING


# --- Health.


async def test_halves_are_not_ready_before_the_database_answers_and_in_a_drain(
    database_url: str, empty_database_url: str
) -> None:
    async with started(empty_database_url) as (_, probe):
        for name in ("reads", "writes", ""):
            assert await probe.check(name) == NOT_SERVING
    async with serving(database_url) as server, channel(server.address) as opened:
        probe = Probe(opened)
        for name in ("reads", "writes", ""):
            assert await probe.check(name) == SERVING
        watch = probe.watch("reads")
        assert (await watch.read()).status == SERVING
        server.readiness.drain()
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        for name in ("reads", "writes", ""):
            assert await probe.check(name) == NOT_SERVING
