"""Failures of PostgreSQL and of its connections.

Calls wait for the database until their deadlines, and every message is stored at most once.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub as Stub
from grpc import StatusCode

from service.store.db import retries
from service.store.db.dsn import parse
from service.store.schema.migrations import upgrade
from tests.faults.conftest import ProxiedService, calls_by_route
from tests.support import commit_faults, failures
from tests.support.chat import Chat, new_message, new_messages
from tests.support.cluster import Cluster, fetch
from tests.support.history import read_valid_history
from tests.support.load import Load, fast_reconnect_options
from tests.support.proxy import Direction, postgres_proxy
from tests.support.servers import channel, serving

UNAVAILABLE = "DATABASE_UNAVAILABLE"
TERMINATE_BACKENDS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'chat-history'
"""


async def wait_until_stored(database_url: str, message_id: str) -> None:
    """Wait until a message is committed."""
    async with asyncio.timeout(20):
        while not await fetch(database_url, "SELECT FROM chat_messages WHERE id = $1", message_id):
            await asyncio.sleep(0.01)


# --- Failures before the commit.


@pytest.mark.case(n=6)
async def test_append_is_retried_when_its_backend_ends_before_the_commit(
    chat: Chat, database_url: str
) -> None:
    """The third attempt is committed. The client receives one success and no replay."""
    await commit_faults.install(database_url)
    session = await chat.create_session()
    await commit_faults.arm(database_url, "terminate", 2)
    reply = await chat.append(session.id, new_messages(3))
    assert [(entry.seq, entry.replayed) for entry in reply.messages] == [
        (1, False),
        (2, False),
        (3, False),
    ]
    stored = await read_valid_history(database_url, chat.user_id, session.id)
    stored.check_contains([reply])
    assert stored.last_seq == 3


@pytest.mark.case(n=6)
@pytest.mark.case(n=13)
@pytest.mark.parametrize("kind", ["terminate", "40001", "40P01"])
async def test_transaction_that_fails_at_its_commit_is_retried(
    chat: Chat, database_url: str, kind: str
) -> None:
    session = await chat.create_session()
    await commit_faults.install(database_url, "chat_sessions", "INSERT OR UPDATE")
    await commit_faults.arm(database_url, kind, 2)
    updated = await chat.update_session(["title"], id=session.id, title="new", etag=session.etag)
    assert updated.title == "new"
    await commit_faults.arm(database_url, kind, 2)
    assert (await chat.create_session(title="created")).title == "created"
    await commit_faults.arm(database_url, kind, 2)
    reply = await chat.append("", new_messages(2))
    assert reply.session_created
    assert [entry.seq for entry in reply.messages] == [1, 2]


@pytest.mark.case(n=13)
@pytest.mark.parametrize("kind", ["40001", "40P01"])
async def test_transaction_that_fails_at_every_commit_is_aborted(
    chat: Chat, database_url: str, kind: str
) -> None:
    session = await chat.create_session()
    await commit_faults.install(database_url, "chat_sessions", "INSERT OR UPDATE")
    await commit_faults.arm(database_url, kind, 1000)
    for call in (
        chat.append(session.id, "never"),
        chat.update_session(["title"], id=session.id, title="never"),
    ):
        failure = await failures.assert_fails(call, "CONTENTION")
        assert failure.code == StatusCode.ABORTED
        assert failure.retry_after is not None
    await commit_faults.arm(database_url, kind, 0)
    assert (await chat.append(session.id, "at last")).messages[0].seq == 1


# --- Failures after the commit was sent.


@pytest.mark.case(n=7)
@pytest.mark.parametrize("is_new", [False, True], ids=["existing session", "new session"])
async def test_append_is_stored_once_when_its_connection_breaks_after_the_commit(
    proxied: ProxiedService, database_url: str, is_new: bool
) -> None:
    """The connection breaks before PostgreSQL's reply arrives.

    The service looks the messages up, and reports one append and no replay.
    """
    chat, proxy = proxied.chat, proxied.proxy
    # These also prepare the statements with and without a session id, so that the next append is
    # sent in one piece.
    session_id = await chat.start()
    await chat.append(session_id, "second")
    messages = new_messages(2)
    proxy.block(Direction.TO_CLIENT)
    call = asyncio.ensure_future(chat.append("" if is_new else session_id, messages))
    await wait_until_stored(database_url, messages[0].id)
    assert not call.done()
    proxy.reset_connections()
    proxy.unblock()
    reply = await call
    assert [(entry.seq, entry.replayed) for entry in reply.messages] == (
        [(1, False), (2, False)] if is_new else [(3, False), (4, False)]
    )
    assert reply.session_created == is_new
    (await read_valid_history(database_url, chat.user_id, reply.session_id)).check_contains([reply])
    replay = await chat.append("" if is_new else session_id, messages)
    assert [(entry.seq, entry.replayed) for entry in replay.messages] == [
        (entry.seq, True) for entry in reply.messages
    ]


@pytest.mark.case(n=7)
async def test_retry_of_stored_append_is_a_replay_even_if_its_connection_breaks(
    proxied: ProxiedService,
) -> None:
    """The service itself runs the statement twice, and still reports that it was stored before."""
    chat, proxy = proxied.chat, proxied.proxy
    messages = new_messages(2)
    session_id = await chat.start(messages)
    # The service decides by the age of a stored message whether its own attempt has stored it. It
    # cannot decide that for a message that was stored immediately before the retry arrived.
    await asyncio.sleep(2)
    for requested_id in (session_id, ""):
        proxy.block(Direction.TO_CLIENT)
        passed = sum(link.passed[Direction.TO_SERVER] for link in proxy.links)
        call = asyncio.ensure_future(chat.append(requested_id, messages))
        while sum(link.passed[Direction.TO_SERVER] for link in proxy.links) == passed:
            await asyncio.sleep(0.01)
        proxy.reset_connections()
        proxy.unblock()
        reply = await call
        assert [(entry.seq, entry.replayed) for entry in reply.messages] == [(1, True), (2, True)]
        assert not reply.session_created


@pytest.mark.case(n=7)
async def test_concurrent_appends_are_stored_once_when_connections_break(
    proxied: ProxiedService, database_url: str
) -> None:
    """The appends are running or queued in batches: of several sessions, some of one message."""
    chat, proxy = proxied.chat, proxied.proxy
    session_ids = [await chat.start() for _ in range(4)]
    same = new_message("the same")
    for turn in range(4):
        calls = [
            asyncio.ensure_future(chat.append(session_ids[n % 4], f"{turn}.{n}")) for n in range(40)
        ]
        calls += [asyncio.ensure_future(chat.append(session_ids[0], [same])) for _ in range(10)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        (proxy.reset_connections, proxy.reset_clients)[turn % 2]()
        replies = await asyncio.gather(*calls)
        assert len({reply.messages[0].seq for reply in replies[40:]}) == 1
        for session_id in session_ids:
            stored = await read_valid_history(database_url, chat.user_id, session_id)
            stored.check_contains(reply for reply in replies if reply.session_id == session_id)
    counts = [(await chat.get_session(session_id)).last_seq for session_id in session_ids]
    assert counts == [1 + 4 * 10 + 1, *[1 + 4 * 10] * 3]


# --- Outages.


@pytest.mark.case(n=10)
async def test_next_call_succeeds_after_all_idle_backends_were_terminated(
    chat: Chat, database_url: str
) -> None:
    """The next call on every route succeeds, as it must when Neon has suspended the database."""
    session_id = await chat.start()
    calls = calls_by_route(chat, session_id)
    for name, call in calls.items():
        await asyncio.gather(*(warm_up() for warm_up in calls.values()))
        [[terminated]] = await fetch(database_url, TERMINATE_BACKENDS)
        assert terminated > 0, name
        await call()


async def test_calls_succeed_while_backends_are_terminated_repeatedly(
    chat: Chat, database_url: str
) -> None:
    session_id = await chat.start()

    calls: list[asyncio.Future[object]] = []

    async def terminate_repeatedly() -> None:
        # Lets one call complete between two rounds, for which a busy machine may need longer than
        # any fixed pause.
        while True:
            await fetch(database_url, TERMINATE_BACKENDS)
            await asyncio.sleep(0.03)
            if pending := [call for call in calls if not call.done()]:
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)

    terminating = asyncio.create_task(terminate_repeatedly())
    try:
        for _ in range(6):
            calls[:] = [
                asyncio.ensure_future(call())
                for call in calls_by_route(chat, session_id).values()
                for _ in range(8)
            ]
            await asyncio.gather(*calls)
    finally:
        terminating.cancel()
        await asyncio.wait([terminating])
    assert (await read_valid_history(database_url, chat.user_id, session_id)).last_seq == 1 + 6 * 8


@pytest.mark.case(n=11)
async def test_calls_wait_while_the_database_refuses_connections(proxied: ProxiedService) -> None:
    """Calls of the outage are answered after it, within their deadlines."""
    session_id = await proxied.chat.start()
    proxied.proxy.refuse_connections()
    calls = {
        name: asyncio.ensure_future(call())
        for name, call in calls_by_route(proxied.chat, session_id).items()
    }
    await asyncio.wait(calls.values(), timeout=5.0)
    assert not any(call.done() for call in calls.values()), calls
    proxied.proxy.accept_connections()
    await asyncio.gather(*calls.values())


async def test_calls_wait_while_a_suspended_database_wakes(
    proxied: ProxiedService, database_url: str
) -> None:
    """All backends end, and new connections hang until the database is awake."""
    session_id = await proxied.chat.start()
    await fetch(database_url, TERMINATE_BACKENDS)
    proxied.proxy.block()
    calls = {
        name: asyncio.ensure_future(call())
        for name, call in calls_by_route(proxied.chat, session_id).items()
    }
    await asyncio.wait(calls.values(), timeout=3.0)
    assert not any(call.done() for call in calls.values()), calls
    proxied.proxy.unblock()
    await asyncio.gather(*calls.values())


@pytest.mark.case(n=11)
async def test_calls_fail_as_unavailable_before_their_deadline(
    proxied: ProxiedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls on every route fail with the service's own status, which has a retry delay."""
    # A long margin, because a busy machine may deliver the reply late.
    monkeypatch.setattr(retries, "REPLY_MARGIN_S", 1.0)
    user_id, session_id, stub = proxied.chat.user_id, await proxied.chat.start(), proxied.chat.stub
    proxied.proxy.refuse_connections()
    ids: Any = {"user_id": user_id, "session_id": session_id}
    append = message_pb2.AppendMessagesRequest(**ids, messages=new_messages(1))
    update = session_pb2.UpdateSessionRequest(
        user_id=user_id, session=session_pb2.Session(id=session_id, title="new")
    )
    calls: list[Awaitable[object]] = [
        stub.GetSession(session_pb2.GetSessionRequest(**ids), timeout=5),
        stub.ListMessages(message_pb2.ListMessagesRequest(**ids), timeout=5),
        stub.GetContext(message_pb2.GetContextRequest(**ids), timeout=5),
        stub.UpdateSession(update, timeout=5),
        stub.AppendMessages(append, timeout=5),
    ]
    await asyncio.gather(*(failures.assert_fails(call, UNAVAILABLE) for call in calls))
    proxied.proxy.accept_connections()
    reply = await stub.AppendMessages(append)
    assert reply.messages[0].seq == 2


# --- Under load.


async def break_connections_under_load(database_url: str, rounds: int, seed: int) -> None:
    """Break the connections to PostgreSQL repeatedly, by faults drawn from a seed."""
    rng = random.Random(seed)
    print(f"seed {seed}")
    async with (
        postgres_proxy(database_url) as (proxy, url),
        serving(url) as server,
        channel(server.address, **fast_reconnect_options()) as connection,
    ):
        faults: list[Callable[[], object]] = [
            proxy.reset_connections,
            proxy.reset_clients,
            proxy.refuse_connections,
            proxy.block,
            lambda: proxy.block(Direction.TO_SERVER),
            lambda: proxy.block(Direction.TO_CLIENT),
            lambda: setattr(proxy, "delay", 0.05),
        ]
        load = Load(await Chat.of_new_user(Stub(connection)), seed=seed)
        async with load.running():
            for _ in range(rounds):
                await load.wait_for_appends(60)
                rng.choice(faults)()
                if rng.random() < 0.2:
                    await fetch(database_url, TERMINATE_BACKENDS)
                await asyncio.sleep(rng.uniform(0.05, 1.5))
                if rng.random() < 0.5:
                    proxy.reset_connections()
                proxy.accept_connections()
                proxy.unblock()
                proxy.delay = 0.0
        await load.check(database_url)
        assert load.count >= 60 * rounds
        print(f"{load.count} messages, refusals {load.refusals}")


async def test_no_append_is_lost_when_connections_break_under_load(database_url: str) -> None:
    await break_connections_under_load(database_url, rounds=8, seed=7)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
async def test_no_append_is_lost_when_connections_break_under_load_repeatedly(
    database_url: str, seed: int
) -> None:
    await break_connections_under_load(database_url, rounds=40, seed=seed)


async def kill_postgres_under_load(cluster: Cluster, rounds: int) -> None:
    url = cluster.url("postgres")
    await upgrade(parse(url))
    async with (
        serving(url) as server,
        channel(server.address, **fast_reconnect_options()) as connection,
    ):
        load = Load(await Chat.of_new_user(Stub(connection)))
        async with load.running():
            for _ in range(rounds):
                await load.wait_for_appends(100)
                os.kill(cluster.pid, signal.SIGKILL)
                await asyncio.to_thread(cluster.postgres.stop)
                await asyncio.to_thread(cluster.postgres.start)
            await load.wait_for_appends(100)
        await load.check(url)
        print(f"{load.count} messages, refusals {load.refusals}")


@pytest.mark.case(n=16)
async def test_no_append_is_lost_when_postgres_is_killed_under_load(own_cluster: Cluster) -> None:
    await kill_postgres_under_load(own_cluster, rounds=1)


@pytest.mark.case(n=16)
@pytest.mark.faults
@pytest.mark.timeout(600)
async def test_no_append_is_lost_when_postgres_is_killed_under_load_repeatedly(
    own_cluster: Cluster,
) -> None:
    await kill_postgres_under_load(own_cluster, rounds=10)
