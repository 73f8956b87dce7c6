"""Health: readiness follows the results of calls, liveness is constant, probes cost nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2, user_pb2
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc.health import SERVICE
from service.server import Server
from service.store import tables
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.support import failures
from tests.support.chat import Chat, new_id
from tests.support.cluster import Cluster, fetch
from tests.support.ports import free_port
from tests.support.proxy import postgres_proxy
from tests.support.servers import channel, connected, serving, target_of
from tests.support.servers import settings as server_settings
from tests.support.statements import SentStatements, database_name

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
READY = ("", SERVICE)
ENOUGH = 20.0
"""Seconds to wait for what is promised within five: a shared machine may pause for some."""


class Probe:
    """A client of the health service."""

    def __init__(self, opened: aio.Channel) -> None:
        self._stub: Any = health_pb2_grpc.HealthStub(opened)

    async def check(self, name: str = "") -> int:
        reply = await self._stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        return int(reply.status)

    async def ready(self) -> bool:
        """Return whether it is ready; both names must have the same status."""
        for _ in range(5):
            first, second = await asyncio.gather(*map(self.check, READY))
            if first == second:  # Otherwise it changed between the two calls.
                return first == SERVING
        raise AssertionError("the two names say different things")

    def watch(self, name: str = "") -> Any:
        return self._stub.Watch(health_pb2.HealthCheckRequest(service=name))

    async def becomes(self, wanted: bool) -> None:
        """Wait until it is ready, or until it is not."""
        async with asyncio.timeout(ENOUGH):
            while await self.ready() != wanted:
                assert await self.check("liveness") == SERVING
                await asyncio.sleep(0.02)


@asynccontextmanager
async def started(url: str, **values: Any) -> AsyncGenerator[tuple[Server, Probe]]:
    """Run a server that may not become ready."""
    server = Server(server_settings(**values), target_of(url))
    await server.start()
    try:
        async with channel(server.address) as opened:
            yield server, Probe(opened)
    finally:
        await server.stop()


@pytest.fixture
async def probe(server: Server) -> AsyncGenerator[Probe]:
    async with channel(server.address) as opened:
        yield Probe(opened)


@asynccontextmanager
async def traffic(chat: Chat, timeout: float = 1.0) -> AsyncGenerator[None]:
    """Send reads and appends continuously, and ignore their failures."""

    async def call_repeatedly(call: Callable[[], Awaitable[object]]) -> None:
        while True:
            with suppress(aio.AioRpcError, TimeoutError):
                async with asyncio.timeout(timeout):
                    await call()
            await asyncio.sleep(0.02)

    session_id = new_id()
    await chat.append(session_id, "first", create_if_missing=True)
    tasks = [
        asyncio.create_task(call_repeatedly(lambda: chat.append(session_id, "more"))),
        asyncio.create_task(call_repeatedly(lambda: chat.page(session_id))),
        asyncio.create_task(call_repeatedly(lambda: chat.get_session(session_id))),
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_ready_server_is_serving(probe: Probe) -> None:
    assert await probe.ready()
    assert await probe.check("liveness") == SERVING
    assert await probe.check("database") == SERVING


async def test_unknown_name_is_not_found(probe: Probe) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await probe.check("chathistory.v1.Nothing")
    assert caught.value.code() == StatusCode.NOT_FOUND
    watch = probe.watch("chathistory.v1.Nothing")
    assert (await watch.read()).status == UNKNOWN
    watch.cancel()


async def test_not_ready_without_a_schema(empty_database_url: str) -> None:
    async with started(empty_database_url) as (server, probe):
        assert not await probe.ready()
        assert await probe.check("database") == SERVING
        async with asyncio.timeout(ENOUGH):
            while "migrate" not in server.readiness.problem:
                await asyncio.sleep(0.02)
        assert not await probe.ready()
        await migrations.upgrade(parse(empty_database_url))
        await probe.becomes(True)
        async with connected(server.address) as stub:
            await Chat.of_new_user(stub)


async def test_not_ready_with_a_schema_that_is_too_old(database_url: str) -> None:
    older = f"{tables.REQUIRED_REVISION - 1:04d}"
    [now] = await fetch(database_url, "SELECT version_num FROM alembic_version")
    await fetch(database_url, "UPDATE alembic_version SET version_num = $1", older)
    async with started(database_url) as (server, probe):
        async with asyncio.timeout(ENOUGH):
            while older not in server.readiness.problem:
                await asyncio.sleep(0.02)
        assert not await probe.ready()
        assert await probe.check("liveness") == SERVING
        await fetch(database_url, "UPDATE alembic_version SET version_num = $1", now[0])
        await probe.becomes(True)


async def test_old_build_is_ready_with_a_newer_schema_until_it_is_contracted(
    database_url: str,
) -> None:
    await fetch(database_url, "UPDATE alembic_version SET version_num = '9999'")
    async with started(database_url) as (server, probe):
        await probe.becomes(True)
    await fetch(database_url, "UPDATE schema_info SET min_build = $1", tables.BUILD)
    async with started(database_url) as (server, probe):
        await probe.becomes(True)
    await fetch(database_url, "UPDATE schema_info SET min_build = $1", tables.BUILD + 1)
    async with started(database_url) as (server, probe):
        async with asyncio.timeout(ENOUGH):
            while "deploy a newer" not in server.readiness.problem:
                await asyncio.sleep(0.02)
        assert not await probe.ready()
        assert await probe.check("liveness") == SERVING


async def test_unreadable_schema_does_not_stop_probing(database_url: str) -> None:
    [now] = await fetch(database_url, "SELECT version_num FROM alembic_version")
    await fetch(database_url, "UPDATE alembic_version SET version_num = 'a1b2c3'")
    async with started(database_url) as (server, probe):
        async with asyncio.timeout(ENOUGH):
            while "not been probed" in server.readiness.problem:
                await asyncio.sleep(0.02)
        assert not await probe.ready()
        await fetch(database_url, "UPDATE alembic_version SET version_num = $1", now[0])
        await probe.becomes(True)


async def test_server_starts_without_a_database_and_becomes_ready(database_url: str) -> None:
    async with postgres_proxy(database_url) as (proxy, url):
        proxy.refuse_connections()
        async with started(url) as (_, probe):
            assert not await probe.ready()
            assert await probe.check("database") == NOT_SERVING
            assert await probe.check("liveness") == SERVING
            proxy.accept_connections()
            await probe.becomes(True)


@pytest.mark.faults
async def test_readiness_follows_a_restart_of_postgres_under_traffic() -> None:
    """A PostgreSQL of its own is stopped (57P01 on every connection) and started again."""
    with Cluster() as cluster:
        await cluster.prepare()
        url = cluster.url(await cluster.create_database())
        async with started(url) as (server, probe), connected(server.address) as stub:
            await probe.becomes(True)
            chat = await Chat.of_new_user(stub)
            async with traffic(chat):
                await asyncio.to_thread(cluster.postgres.stop)
                await probe.becomes(False)
                assert await probe.check("database") == NOT_SERVING
                await asyncio.to_thread(cluster.postgres.start)
                await probe.becomes(True)
                await chat.start()
                async with asyncio.timeout(ENOUGH):
                    while await probe.check("database") != SERVING:
                        await asyncio.sleep(0.1)


@pytest.mark.faults
@pytest.mark.case(n=12)
async def test_readiness_follows_a_silent_outage_under_traffic(database_url: str) -> None:
    """No connection is refused and none is answered; the server recovers automatically."""
    async with (
        postgres_proxy(database_url) as (proxy, url),
        serving(url) as server,
        channel(server.address) as opened,
    ):
        probe = Probe(opened)
        async with connected(server.address) as stub:
            chat = await Chat.of_new_user(stub)
            async with traffic(chat):
                proxy.block()
                await probe.becomes(False)
                proxy.unblock()
                await probe.becomes(True)
                await chat.start()


@pytest.mark.faults
@pytest.mark.case(n=12)
@pytest.mark.parametrize("deadline_of", ["client", "server"])
async def test_calls_end_at_their_deadline_during_a_silent_outage(
    database_url: str, deadline_of: str
) -> None:
    """By the client's deadline, else by the server's; and the server stops working on them."""
    of_server, of_client = (0.8, None) if deadline_of == "server" else (30.0, 0.8)
    async with (
        postgres_proxy(database_url) as (proxy, url),
        serving(url, call_timeout=of_server) as server,
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        session = await chat.create_session()
        proxy.block()
        requests: dict[str, dict[str, Any]] = {
            "GetSession": {"session_id": session.id},
            "ListMessages": {"session_id": session.id},
            "GetContext": {"session_id": session.id},
            "AppendMessages": {
                "session_id": session.id,
                "messages": [{"role": 1, "content": "?", "id": new_id()}],
            },
            "DeleteSession": {"session_id": session.id},
        }
        async with asyncio.timeout(60):
            for name, fields in requests.items():
                kind = getattr(message_pb2, f"{name}Request", None) or getattr(
                    session_pb2, f"{name}Request"
                )
                with pytest.raises(aio.AioRpcError) as caught:
                    await getattr(stub, name)(
                        kind(user_id=chat.user_id, **fields), timeout=of_client
                    )
                # An append that knows of the outage is answered shortly before its deadline.
                late = (
                    StatusCode.DEADLINE_EXCEEDED,
                    StatusCode.UNAVAILABLE if name == "AppendMessages" else None,
                )
                assert caught.value.code() in late, name
                while server.calls.in_flight:
                    await asyncio.sleep(0.01)
        proxy.unblock()
        async with asyncio.timeout(20):
            while True:
                with suppress(aio.AioRpcError):
                    await chat.start()
                    break
                await asyncio.sleep(0.05)


@pytest.mark.faults
async def test_database_check_of_an_idle_service_makes_a_round_trip(database_url: str) -> None:
    async with (
        postgres_proxy(database_url) as (proxy, url),
        serving(url) as server,
        channel(server.address) as opened,
    ):
        probe = Probe(opened)
        assert await probe.check("database") == SERVING
        proxy.refuse_connections()
        # Its answer is reused for a second, and readiness follows it.
        async with asyncio.timeout(ENOUGH):
            while await probe.check("database") == SERVING:
                await asyncio.sleep(0.05)
        await probe.becomes(False)
        proxy.accept_connections()
        async with asyncio.timeout(ENOUGH):
            while await probe.check("database") == NOT_SERVING:
                await asyncio.sleep(0.05)
        await probe.becomes(True)


async def test_concurrent_database_checks_share_one_round_trip(
    probe: Probe, cluster: Cluster, database_url: str
) -> None:
    await probe.check("database")
    await asyncio.sleep(1.1)  # Its answer is no longer reused.
    sent = SentStatements(cluster, database_url)
    assert set(await asyncio.gather(*(probe.check("database") for _ in range(50)))) == {SERVING}
    together = len(sent.so_far())
    assert together > 0, "it sends a statement"
    await asyncio.sleep(1.1)
    sent = SentStatements(cluster, database_url)
    await probe.check("database")
    assert len(sent.so_far()) == together, "fifty checks cost as much as one"


@pytest.mark.faults
async def test_health_watch_sends_every_change(database_url: str) -> None:
    async with postgres_proxy(database_url) as (proxy, url):
        proxy.refuse_connections()
        async with started(url) as (server, probe), connected(server.address) as stub:
            watch = probe.watch(SERVICE)
            alive = probe.watch("liveness")
            assert (await watch.read()).status == NOT_SERVING
            assert (await alive.read()).status == SERVING
            async with asyncio.timeout(60):
                for _ in range(2):
                    proxy.accept_connections()
                    assert (await watch.read()).status == SERVING
                    proxy.refuse_connections()
                    change = asyncio.ensure_future(watch.read())
                    while not change.done():
                        with suppress(aio.AioRpcError):
                            await stub.CreateUser(_new_user(), timeout=0.5)
                    assert (await change).status == NOT_SERVING
            alive.cancel()
            watch.cancel()


async def test_open_health_watch_does_not_delay_shutdown(database_url: str) -> None:
    """It gets the last status and ends: a load balancer's watch must not use up the grace."""
    async with (
        serving(database_url, shutdown_grace=600.0, shutdown_delay=0.3) as server,
        channel(server.address) as opened,
    ):
        watches = [Probe(opened).watch(name) for name in ("", SERVICE, "liveness")]
        for watch in watches:
            assert (await watch.read()).status == SERVING
        stopping = asyncio.create_task(server.stop())
        for watch in watches[:2]:
            assert (await watch.read()).status == NOT_SERVING
        async with asyncio.timeout(20):
            for watch in watches:
                assert await watch.code() == StatusCode.UNAVAILABLE
            await stopping


@pytest.mark.faults
async def test_probes_of_an_idle_service_send_no_statement(
    probe: Probe, chat: Chat, cluster: Cluster, database_url: str
) -> None:
    await probed(probe, chat, SentStatements(cluster, database_url), seconds=3.0)


@pytest.mark.faults
@pytest.mark.timeout(120)
async def test_probes_for_a_minute_send_no_statement(
    probe: Probe, chat: Chat, cluster: Cluster, database_url: str
) -> None:
    await probed(probe, chat, SentStatements(cluster, database_url), seconds=60.0)


async def probed(probe: Probe, chat: Chat, before: SentStatements, seconds: float) -> None:
    """Use the service, then send only the probes of a kubelet and a load balancer."""
    await chat.start()
    await asyncio.sleep(0.5)  # The append may raise the counter of the history in the background.
    used = len(before.so_far())
    assert used > 0
    watch = probe.watch()
    await watch.read()
    for _ in range(int(seconds)):
        assert await probe.ready()
        assert await probe.check("liveness") == SERVING
        await asyncio.sleep(1.0)
    assert before.so_far()[used:] == []
    watch.cancel()


@pytest.mark.faults
async def test_locked_rows_do_not_end_readiness(database_url: str, cluster: Cluster) -> None:
    """Every connection of a small pool waits for a locked row, but the database answers."""
    async with (
        serving(database_url, db_pool_size=2, db_max_overflow=0, db_pool_timeout=0.5) as server,
        channel(server.address) as opened,
    ):
        probe = Probe(opened)
        async with connected(server.address) as stub:
            chat = await Chat.of_new_user(stub)
            session = await chat.create_session()
            holder = await cluster.connect(database_name(database_url))
            try:
                async with holder.transaction():
                    await holder.execute(
                        "SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", session.id
                    )
                    waiting = [
                        asyncio.create_task(
                            chat.update_session(["title"], id=session.id, title=f"{n}")
                        )
                        for n in range(4)
                    ]
                    for _ in range(30):
                        assert await probe.ready(), server.readiness.problem
                        await asyncio.sleep(0.1)
            finally:
                await holder.close()
            await asyncio.wait(waiting)
            # Those that waited for a connection for half a second are rejected: not UNAVAILABLE.
            for task in waiting:
                if error := task.exception():
                    assert isinstance(error, aio.AioRpcError)
                    assert failures.read_failure(error).reason == "OVERLOADED"


async def test_health_is_served_on_the_health_port_too(database_url: str) -> None:
    port = free_port()
    async with (
        serving(database_url, health_listen=f"127.0.0.1:{port}"),
        channel(f"127.0.0.1:{port}") as opened,
    ):
        assert await Probe(opened).ready()
        async with connected(f"127.0.0.1:{port}") as stub:
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.CreateUser(_new_user())
        assert caught.value.code() == StatusCode.UNIMPLEMENTED


def _new_user() -> Any:
    return user_pb2.CreateUserRequest(user=user_pb2.User(name="somebody"))
