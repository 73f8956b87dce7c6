"""Reads that may lag go to a standby while it is fresh enough, and to the primary otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from typing import NamedTuple

import pytest
import sqlalchemy as sa
from chathistory.v1 import export_pb2, message_pb2

from service.cli import check
from service.doctor import Verdict
from service.server import Server
from service.store.db.database import NO_OWNER, Database
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.support.chat import Chat, new_messages
from tests.support.cluster import Cluster, fetch
from tests.support.lagging import ENOUGH, eventual, outcomes, read_from_replica
from tests.support.pgbouncer import PgBouncer, find_program
from tests.support.ports import UNUSED_ADDRESS
from tests.support.replicated_postgres import Node, ReplicatedPostgres
from tests.support.servers import connected, serving, settings
from tests.support.tools import skip_or_fail

pytestmark = pytest.mark.timeout(300)

MAX_LAG_S = 2.0
"""The shortest bound."""
LONG_LAG_S = 600.0
"""A bound that no test reaches: the standby may lag by everything that happens in the test."""
ORDERS = (message_pb2.MESSAGE_ORDER_ASC, message_pb2.MESSAGE_ORDER_DESC)


class Replicated(NamedTuple):
    """A service with a replica, and a user of it with a session of 30 messages."""

    server: Server
    chat: Chat
    lagging: Chat
    """The same user, whose reads may lag."""
    session_id: str
    pair: ReplicatedPostgres

    @property
    def standby(self) -> Node:
        return self.pair.nodes[1]

    async def list_sessions(self) -> list[str]:
        return [session.id for session in (await self.lagging.list_sessions()).sessions]

    async def read_from_replica(self) -> None:
        """Wait until the replica serves a list of sessions."""
        await read_from_replica(self.server, self.list_sessions)


@pytest.fixture
def pair(cluster: Cluster) -> Generator[ReplicatedPostgres]:
    """Provide a primary and a standby, with a migrated schema."""
    with ReplicatedPostgres() as pair:
        asyncio.run(migrations.upgrade(parse(pair.nodes[0].url)))
        yield pair


@pytest.fixture
async def replicated(
    pair: ReplicatedPostgres, request: pytest.FixtureRequest
) -> AsyncGenerator[Replicated]:
    """Provide a service whose replica is the standby; the parameter is the bound of its lag."""
    max_lag_s = getattr(request, "param", MAX_LAG_S)
    async with (
        serving(
            parse(pair.url()), DATABASE_READ_URL=pair.nodes[1].url, read_max_lag=max_lag_s
        ) as server,
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start(new_messages(30))
        yield Replicated(server, chat, eventual(chat), session_id, pair)


with_a_long_bound = pytest.mark.parametrize("replicated", [LONG_LAG_S], indirect=True)


async def pause_replay(node: Node) -> None:
    """Let a standby lag, with all that it has received."""
    await fetch(node.url, "SELECT pg_wal_replay_pause()")
    async with asyncio.timeout(ENOUGH):
        while (await fetch(node.url, "SELECT pg_get_wal_replay_pause_state()"))[0][0] != "paused":
            await asyncio.sleep(0.02)


async def resume_replay(node: Node) -> None:
    await fetch(node.url, "SELECT pg_wal_replay_resume()")


@with_a_long_bound
async def test_strong_reads_and_first_pages_never_use_the_replica(replicated: Replicated) -> None:
    await replicated.read_from_replica()
    await pause_replay(replicated.standby)
    before = outcomes(replicated.server)
    for number in range(5):
        await replicated.chat.append(replicated.session_id, f"new {number}")
        context = await replicated.chat.context(replicated.session_id)
        assert context.messages[-1].content == f"new {number}"
        page = await replicated.lagging.page(replicated.session_id, order=ORDERS[1])
        assert page.messages[0].content == f"new {number}"
    assert outcomes(replicated.server) == before
    # The standby does lag: a call that accepts it gets an older context.
    context = await replicated.lagging.context(replicated.session_id)
    assert context.messages[-1].content == "message 30"


@with_a_long_bound
@pytest.mark.parametrize("order", ORDERS)
async def test_pages_have_no_gap_although_the_replica_lags(
    replicated: Replicated, order: message_pb2.MessageOrder.ValueType
) -> None:
    """The first page is the primary's, which has messages that the replica lacks."""
    await replicated.read_from_replica()
    await pause_replay(replicated.standby)
    await replicated.chat.append(replicated.session_id, new_messages(40, "later"))
    before = outcomes(replicated.server)
    messages = await replicated.lagging.all(replicated.session_id, page_size=10, order=order)
    seqs = [message.seq for message in messages]
    assert seqs == sorted(range(1, 71), reverse=order == ORDERS[1])
    after = outcomes(replicated.server)
    assert after["replica"] > before["replica"], "the pages that the replica has"
    assert after["stale"] > before["stale"], "the pages that it lacks"


async def test_session_that_the_replica_lacks_is_read_from_the_primary(
    replicated: Replicated,
) -> None:
    await replicated.read_from_replica()
    await pause_replay(replicated.standby)
    session_id = await replicated.chat.start("a new session")
    context = await replicated.lagging.context(session_id)
    assert [message.content for message in context.messages] == ["a new session"]


async def test_nothing_is_returned_that_was_erased_longer_ago_than_the_bound(
    replicated: Replicated,
) -> None:
    """Nor is anything missing that was stored before that."""
    chat, lagging = replicated.chat, replicated.lagging
    erased_id = (await chat.append(replicated.session_id, "erase this")).messages[0].id
    other_id = await chat.start("another session")
    await replicated.read_from_replica()
    await pause_replay(replicated.standby)
    await chat.delete(replicated.session_id, erased_id)
    await chat.delete_session(other_id)
    new_id = await chat.start("a new session")
    changed_at = asyncio.get_running_loop().time()
    while True:
        await asyncio.sleep(0.1)
        is_later_than_the_bound = asyncio.get_running_loop().time() > changed_at + MAX_LAG_S
        session_ids = await replicated.list_sessions()
        context = await lagging.context(replicated.session_id)
        hits = await lagging.stub.SearchMessages(
            message_pb2.SearchMessagesRequest(
                user_id=chat.user_id, query="erase", mode=message_pb2.SEARCH_MODE_LEXICAL
            )
        )
        request = export_pb2.ExportUserDataRequest(user_id=chat.user_id)
        items = [item async for item in lagging.stub.ExportUserData(request)]
        if is_later_than_the_bound:
            break
    assert sorted(session_ids) == sorted([replicated.session_id, new_id])
    assert "erase this" not in [message.content for message in context.messages]
    assert not hits.hits
    assert "erase this" not in [item.message.content for item in items]
    assert other_id not in [item.session.id for item in items]
    assert outcomes(replicated.server)["stale"] > 0


async def test_replica_is_read_again_when_it_has_caught_up(replicated: Replicated) -> None:
    await replicated.read_from_replica()
    await pause_replay(replicated.standby)
    async with asyncio.timeout(ENOUGH):
        stale = outcomes(replicated.server)["stale"]
        while outcomes(replicated.server)["stale"] == stale:
            await replicated.list_sessions()
            await asyncio.sleep(0.1)
    assert replicated.server.lagging is not None
    assert replicated.server.lagging.gate.lag_s > 0
    await resume_replay(replicated.standby)
    await replicated.read_from_replica()
    assert replicated.server.readiness.is_ready


async def test_idle_time_does_not_make_the_replica_look_stale(replicated: Replicated) -> None:
    """The age of the last replayed transaction would grow with it."""
    await replicated.read_from_replica()
    await asyncio.sleep(2 * MAX_LAG_S)
    await replicated.list_sessions()  # No mark is young enough: the primary answers.
    await replicated.read_from_replica()
    assert replicated.server.lagging is not None
    assert replicated.server.lagging.gate.lag_s < MAX_LAG_S


@pytest.mark.parametrize("is_silent", [False, True])
async def test_calls_succeed_while_the_replica_is_down(
    replicated: Replicated, *, is_silent: bool
) -> None:
    """Whether it refuses connections or does not answer, and the service stays ready."""
    await replicated.read_from_replica()
    standby = replicated.standby
    if is_silent:
        standby.pause()
    else:
        standby.kill()
    before = outcomes(replicated.server)
    for _ in range(5):
        assert await replicated.list_sessions() == [replicated.session_id]
        assert (await replicated.lagging.context(replicated.session_id)).messages
        assert replicated.server.readiness.is_ready
    after = outcomes(replicated.server)
    assert (after["replica"], after["failed"]) == (before["replica"], before["failed"] + 10)
    if is_silent:
        standby.resume()
    else:
        await asyncio.to_thread(standby.start)
    await replicated.read_from_replica()


async def test_reads_go_on_after_a_switchover(pair: ReplicatedPostgres) -> None:
    """Both connection strings name both servers, which change their roles."""
    first, second = pair.nodes
    async with (
        serving(parse(pair.url()), DATABASE_READ_URL=pair.url(), read_max_lag=MAX_LAG_S) as server,
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        lagging, session_id = eventual(chat), await chat.start("before")
        await read_from_replica(server, lagging.list_sessions)
        await asyncio.to_thread(pair.switch_over, first, second)
        await chat.append(session_id, "after")
        async with asyncio.timeout(ENOUGH):
            while True:
                context = await read_from_replica(server, lambda: lagging.context(session_id))
                if context.messages[-1].content == "after":
                    break


async def test_replica_is_the_standby_whichever_host_is_named_first(
    pair: ReplicatedPostgres,
) -> None:
    urls = [
        f"postgresql://postgres@{first.address},{second.address}/postgres?sslmode=disable"
        for first, second in (pair.nodes, pair.nodes[::-1])
    ]
    for url in urls:
        assert await is_standby(url)
        assert await is_standby(f"{url}&target_session_attrs=standby")
    # Without a standby, the primary is better than nothing unless the connection string forbids it.
    await asyncio.to_thread(pair.nodes[1].kill)
    assert not await is_standby(urls[0])
    with pytest.raises(OSError, match="writable"):
        await is_standby(f"{urls[0]}&target_session_attrs=standby")


async def is_standby(url: str) -> bool:
    """Connect as to a replica, and return whether the server is a standby."""
    database = Database(parse(url, is_replica=True))
    try:
        async with database.engine.connect() as connection:
            return bool(await connection.scalar(sa.text("SELECT pg_is_in_recovery()")))
    finally:
        await database.close()


async def test_standby_is_read_through_a_pooler(pair: ReplicatedPostgres) -> None:
    """The primary must not be a standby behind a pooler, and the replica may."""
    if find_program() is None:
        skip_or_fail("pgbouncer is not installed")
    standby = pair.nodes[1]
    upstream = f"postgresql://postgres@/postgres?host=127.0.0.1&port={standby.port}"
    with PgBouncer(upstream) as pooler:
        async with (
            serving(
                parse(pair.url()), DATABASE_READ_URL=pooler.url("postgres"), read_max_lag=LONG_LAG_S
            ) as server,
            connected(server.address) as stub,
        ):
            chat = await Chat.of_new_user(stub)
            lagging, session_id = eventual(chat), await chat.start()
            await read_from_replica(server, lagging.list_sessions)
            context = await read_from_replica(server, lambda: lagging.context(session_id))
            assert [message.content for message in context.messages] == ["hello"]
            assert outcomes(server)["failed"] == 0


async def test_check_reports_the_replica(pair: ReplicatedPostgres, database_url: str) -> None:
    primary, standby = pair.nodes
    await fetch(database_url, "UPDATE history_epoch SET epoch = gen_random_uuid()")
    cases = {
        standby.url: (Verdict.OK, f"{standby.address}/postgres is a standby, "),
        primary.url: (Verdict.NOTE, "is not a standby"),
        database_url: (Verdict.TODO, "does not hold the history of DATABASE_URL"),
        f"postgresql://u@{UNUSED_ADDRESS}/d": (Verdict.TODO, "connection refused at"),
    }
    for url, (verdict, text) in cases.items():
        [finding] = await asyncio.to_thread(
            check._check_replica, settings(DATABASE_READ_URL=url), parse(primary.url)
        )
        assert (finding.subject, finding.verdict) == ("replica", verdict)
        assert text in finding.message
    assert not check._check_replica(settings(), parse(primary.url))


async def test_calls_without_the_metadata_send_the_replica_nothing(
    replicated: Replicated,
) -> None:
    await replicated.read_from_replica()
    assert replicated.server.lagging is not None
    replica = replicated.server.lagging.replica
    successes = replica.outcomes.reads.successes
    await replicated.chat.list_sessions()
    await replicated.chat.all(replicated.session_id, page_size=10)
    await replicated.chat.context(replicated.session_id)
    await replicated.chat.append(replicated.session_id, "more")
    assert replica.outcomes.reads.successes == successes


async def test_work_on_the_replica_runs_in_one_transaction(replicated: Replicated) -> None:
    """So that the age of the data holds for the server that returns them, behind a pooler too."""
    await replicated.read_from_replica()
    lagging = replicated.server.lagging
    assert lagging is not None
    is_first_statement = await lagging.read_replica(
        lambda connection: connection.scalar(sa.text("SELECT now() = statement_timestamp()")),
        owner_id=NO_OWNER,
        deadline=asyncio.get_running_loop().time() + ENOUGH,
    )
    assert is_first_statement is False
