"""PostgreSQL goes away, in all the ways it can: calls wait for it as long as they may, and what is stored is stored once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub as Stub
from grpc import StatusCode

from service.store.db import database
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

AWAY = "DATABASE_UNAVAILABLE"
TERMINATE = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'chat-history'
"""


async def visible(database_url: str, message_id: str) -> None:
    """Wait until a message is committed."""
    async with asyncio.timeout(20):
        while not await fetch(database_url, "SELECT FROM chat_messages WHERE id = $1", message_id):
            await asyncio.sleep(0.01)


# --- Before the commit.


@pytest.mark.case(n=6)
async def test_append_is_retried_when_its_backend_ends_before_the_commit(
    chat: Chat, database_url: str
) -> None:
    """Twice, and the third time it is committed: the client sees one success, and no replay."""
    await commit_faults.install(database_url)
    session = await chat.create_session()
    await commit_faults.arm(database_url, "terminate", 2)
    reply = await chat.append(session.id, new_messages(3))
    assert [(entry.seq, entry.replayed) for entry in reply.messages] == [
        (1, False),
        (2, False),
        (3, False),
    ]
    found = await read_valid_history(database_url, chat.user_id, session.id)
    found.check_contains([reply])
    assert found.last_seq == 3


@pytest.mark.case(n=6)
@pytest.mark.case(n=13)
@pytest.mark.parametrize("kind", ["terminate", "40001", "40P01"])
async def test_transaction_that_fails_at_its_commit_is_retried(
    chat: Chat, database_url: str, kind: str
) -> None:
    session = await chat.create_session()
    await commit_faults.install(database_url, "chat_sessions", "INSERT OR UPDATE")
    await commit_faults.arm(database_url, kind, 2)
    changed = await chat.update_session(["title"], id=session.id, title="new", etag=session.etag)
    assert changed.title == "new"
    await commit_faults.arm(database_url, kind, 2)
    assert (await chat.create_session(title="made")).title == "made"
    await commit_faults.arm(database_url, kind, 2)
    made = await chat.append("", new_messages(2))
    assert made.session_created
    assert [entry.seq for entry in made.messages] == [1, 2]


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
        found = await failures.assert_fails(call, "CONTENTION")
        assert found.code == StatusCode.ABORTED
        assert found.retry_after is not None
    await commit_faults.arm(database_url, kind, 0)
    assert (await chat.append(session.id, "at last")).messages[0].seq == 1


# --- After the commit was sent.


@pytest.mark.case(n=7)
@pytest.mark.parametrize("starts", [False, True], ids=["session there", "session started"])
async def test_append_is_stored_once_when_its_connection_breaks_after_the_commit(
    proxied: ProxiedService, database_url: str, starts: bool
) -> None:
    """The answer is on its way when the connection breaks. The service looks what has become of it: one row, no replay."""
    chat, proxy = proxied.chat, proxied.proxy
    session_id = (
        await chat.start()
    )  # And the statement is prepared: the next one is sent in one piece.
    messages = new_messages(2)
    proxy.block(Direction.TO_CLIENT)
    call = asyncio.ensure_future(chat.append("" if starts else session_id, messages))
    await visible(database_url, messages[0].id)
    assert not call.done()
    proxy.reset_connections()
    proxy.unblock()
    reply = await call
    assert [(entry.seq, entry.replayed) for entry in reply.messages] == (
        [(1, False), (2, False)] if starts else [(2, False), (3, False)]
    )
    assert reply.session_created == starts
    (await read_valid_history(database_url, chat.user_id, reply.session_id)).check_contains([reply])
    again = await chat.append("" if starts else session_id, messages)
    assert [(entry.seq, entry.replayed) for entry in again.messages] == [
        (e.seq, True) for e in reply.messages
    ]


@pytest.mark.case(n=7)
async def test_retry_of_stored_append_is_a_replay_even_if_its_connection_breaks(
    proxied: ProxiedService,
) -> None:
    """The service sends it twice itself, but it had been stored before: the client is told so."""
    chat, proxy = proxied.chat, proxied.proxy
    messages = new_messages(2)
    session_id = await chat.start(messages)
    # Whose it is tells its age. What was stored just before the retry came, and within the time that PostgreSQL's answer to that takes,
    # cannot be told from what the retry itself has stored.
    await asyncio.sleep(2)
    for again in (session_id, ""):
        proxy.block(Direction.TO_CLIENT)
        passed = sum(link.passed[Direction.TO_SERVER] for link in proxy.links)
        call = asyncio.ensure_future(chat.append(again, messages))
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
    """Shared statements: what was under way, and what was waiting, of several sessions and of the same message."""
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
            found = await read_valid_history(database_url, chat.user_id, session_id)
            found.check_contains(reply for reply in replies if reply.session_id == session_id)
    counts = [(await chat.get_session(session_id)).last_seq for session_id in session_ids]
    assert counts == [1 + 4 * 10 + 1, *[1 + 4 * 10] * 3]


# --- Away, and back.


@pytest.mark.case(n=10)
async def test_next_call_succeeds_after_all_idle_backends_were_terminated(
    chat: Chat, database_url: str
) -> None:
    """As when Neon suspends: the next call of every kind goes through."""
    session_id = await chat.start()
    for name, call in calls_by_route(chat, session_id).items():
        await asyncio.gather(*(other() for other in calls_by_route(chat, session_id).values()))
        [[ended]] = await fetch(database_url, TERMINATE)
        assert ended > 0, name
        await call()


async def test_calls_succeed_while_backends_are_terminated_repeatedly(
    chat: Chat, database_url: str
) -> None:
    session_id = await chat.start()

    calls: list[asyncio.Future[object]] = []

    async def end_them() -> None:
        # As often as a call can get through in between: a busy machine needs longer for one than a fixed pause lasts.
        while True:
            await fetch(database_url, TERMINATE)
            await asyncio.sleep(0.03)
            if left := [call for call in calls if not call.done()]:
                await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)

    ending = asyncio.create_task(end_them())
    try:
        for _ in range(6):
            calls[:] = [
                asyncio.ensure_future(call())
                for call in calls_by_route(chat, session_id).values()
                for _ in range(8)
            ]
            await asyncio.gather(*calls)
    finally:
        ending.cancel()
        await asyncio.wait([ending])
    assert (await read_valid_history(database_url, chat.user_id, session_id)).last_seq == 1 + 6 * 8


@pytest.mark.case(n=11)
async def test_calls_wait_while_the_database_refuses_connections(proxied: ProxiedService) -> None:
    """Calls that come meanwhile are answered when it is back, within their deadlines; then it is as it was."""
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
    """All backends end, and new connections hang before they are answered."""
    session_id = await proxied.chat.start()
    await fetch(database_url, TERMINATE)
    proxied.proxy.block()
    calls = {
        name: asyncio.ensure_future(call())
        for name, call in calls_by_route(proxied.chat, session_id).items()
    }
    await asyncio.wait(calls.values(), timeout=3.0)
    proxied.proxy.unblock()
    await asyncio.gather(*calls.values())


@pytest.mark.case(n=11)
async def test_calls_fail_as_unavailable_before_their_deadline(
    proxied: ProxiedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of every kind are told so, and when to come back, before their deadlines."""
    monkeypatch.setattr(
        database, "REPLY_MARGIN_S", 1.0
    )  # A busy machine takes its time to carry an answer.
    user_id, session_id, stub = proxied.chat.user_id, await proxied.chat.start(), proxied.chat.stub
    proxied.proxy.refuse_connections()
    owned: Any = {"user_id": user_id, "session_id": session_id}
    request = message_pb2.AppendMessagesRequest(**owned, messages=new_messages(1))
    title = session_pb2.Session(id=session_id, title="new")
    await asyncio.gather(
        failures.assert_fails(
            stub.GetSession(session_pb2.GetSessionRequest(**owned), timeout=5), AWAY
        ),
        failures.assert_fails(
            stub.ListMessages(message_pb2.ListMessagesRequest(**owned), timeout=5), AWAY
        ),
        failures.assert_fails(
            stub.GetContext(message_pb2.GetContextRequest(**owned), timeout=5), AWAY
        ),
        failures.assert_fails(
            stub.UpdateSession(
                session_pb2.UpdateSessionRequest(user_id=user_id, session=title), timeout=5
            ),
            AWAY,
        ),
        failures.assert_fails(stub.AppendMessages(request, timeout=5), AWAY),
    )
    proxied.proxy.accept_connections()
    reply = await stub.AppendMessages(request)
    assert reply.messages[0].seq == 2


# --- Under load.


async def _cut_under_load(database_url: str, rounds: int, seed: int) -> None:
    """Break the connections to PostgreSQL in ways that are drawn from a seed, again and again."""
    drawn = random.Random(seed)
    print(f"seed {seed}")
    async with (
        postgres_proxy(database_url) as (proxy, url),
        serving(url) as server,
        channel(server.address, **fast_reconnect_options()) as opened,
    ):
        ways: list[Callable[[], object]] = [
            proxy.reset_connections,
            proxy.reset_clients,
            proxy.refuse_connections,
            proxy.block,
            lambda: proxy.block(Direction.TO_SERVER),
            lambda: proxy.block(Direction.TO_CLIENT),
            lambda: setattr(proxy, "delay", 0.05),
        ]
        load = Load(await Chat.of_new_user(Stub(opened)), seed=seed)
        async with load.running():
            for _ in range(rounds):
                await load.wait_for_appends(60)
                drawn.choice(ways)()
                if drawn.random() < 0.2:
                    await fetch(database_url, TERMINATE)
                await asyncio.sleep(drawn.uniform(0.05, 1.5))
                if drawn.random() < 0.5:
                    proxy.reset_connections()
                proxy.accept_connections()
                proxy.unblock()
                proxy.delay = 0.0
        await load.check(database_url)
        assert load.count >= 60 * rounds
        print(f"{load.count} messages, refusals {load.refusals}")


async def test_no_append_is_lost_when_connections_break_under_load(database_url: str) -> None:
    await _cut_under_load(database_url, rounds=8, seed=7)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
async def test_no_append_is_lost_when_connections_break_under_load_repeatedly(
    database_url: str, seed: int
) -> None:
    await _cut_under_load(database_url, rounds=40, seed=seed)


async def _postgres_killed_under_load(cluster: Cluster, rounds: int) -> None:
    url = cluster.url("postgres")
    await upgrade(parse(url))
    async with (
        serving(url) as server,
        channel(server.address, **fast_reconnect_options()) as opened,
    ):
        load = Load(await Chat.of_new_user(Stub(opened)))
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
    await _postgres_killed_under_load(own_cluster, rounds=1)


@pytest.mark.case(n=16)
@pytest.mark.faults
@pytest.mark.timeout(600)
async def test_no_append_is_lost_when_postgres_is_killed_under_load_repeatedly(
    own_cluster: Cluster,
) -> None:
    await _postgres_killed_under_load(own_cluster, rounds=10)
