"""Synchronous replication: nothing that only one server has is acknowledged.

PostgreSQL itself stops waiting for a standby when the connection of the commit is cut, when the
wait is cancelled, and when the server restarts. The rows are then stored on the primary, and a
failover loses them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, NamedTuple

import pytest
from chathistory.v1 import document_pb2, user_pb2
from grpc import aio

from service import doctor
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.conftest import StartProcess
from tests.support.chat import Chat, new_id, new_messages
from tests.support.cluster import Cluster, fetch
from tests.support.failures import assert_fails, failure_of
from tests.support.history import read_valid_history
from tests.support.proxy import Proxy
from tests.support.replicated_postgres import Node, ReplicatedPostgres
from tests.support.servers import connected, serving
from tests.support.statements import database_name

# The last statement of a session is that of its commit: a hot statement, or COMMIT.
WAITING_COMMITS = """
SELECT pid FROM pg_stat_activity
WHERE wait_event = 'SyncRep' AND query_start > $1
  AND (query LIKE '%chat_sessions%' OR query = 'COMMIT;')
"""
TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
CANCEL = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


class ReplicatedService(NamedTuple):
    """A service that connects through a proxy to a primary, whose commits wait for a standby."""

    primary: Node
    standby: Node
    proxy: Proxy
    chat: Chat

    async def fail_over(self) -> None:
        """Lose the primary, promote the standby, and let the service connect to it."""
        self.primary.kill()
        await asyncio.to_thread(self.standby.start)
        await asyncio.to_thread(self.standby.promote)
        self.proxy.upstream = self.standby.address
        self.proxy.reset_connections()


@pytest.fixture
async def pair(cluster: Cluster) -> AsyncGenerator[ReplicatedPostgres]:
    """Provide a primary and its synchronous standby, with a migrated schema.

    `cluster` has created the account that they run under.
    """
    with ReplicatedPostgres() as pair:
        primary = pair.nodes[0]
        await migrations.upgrade(parse(primary.url))
        await fetch(primary.url, "ALTER SYSTEM SET synchronous_standby_names = 's1'")
        # A reload would reach each process of the server at another time.
        primary.stop()
        primary.start()
        yield pair


@asynccontextmanager
async def replicated_service(
    pair: ReplicatedPostgres, **settings: Any
) -> AsyncGenerator[ReplicatedService]:
    """Run a service on the primary of a pair."""
    primary, standby = pair.nodes
    async with Proxy(primary.address) as proxy:
        target = parse(primary.url.replace(primary.address, proxy.address))
        async with serving(target, **settings) as server, connected(server.address) as stub:
            yield ReplicatedService(primary, standby, proxy, await Chat.of_new_user(stub))


async def clock(node: Node) -> datetime:
    """Return the time of a server's clock."""
    time: datetime
    [[time]] = await fetch(node.url, "SELECT clock_timestamp()")
    return time


async def until_commits_wait(node: Node, since: datetime, *calls: asyncio.Future[Any]) -> None:
    """Wait until a commit of each call, sent after `since`, waits for the standby.

    Args:
        node: The primary.
        since: A time of its clock.
        calls: The calls that make the commits. None of them may be answered before.
    """
    async with asyncio.timeout(30):
        while len(await fetch(node.url, WAITING_COMMITS, since)) < len(calls):
            answered = [call for call in calls if call.done()]
            assert not answered, answered
            await asyncio.sleep(0.02)


async def end_wait(node: Node, cut: str) -> None:
    """End the wait of every commit for the standby, which leaves their rows on this server."""
    match cut:
        case "terminated":
            await fetch(node.url, TERMINATE)
        case "cancelled":
            await fetch(node.url, CANCEL)
        case "restarted":
            node.kill()
            await asyncio.to_thread(node.start)
        case _:
            raise ValueError(cut)


@pytest.mark.case(n=504)
@pytest.mark.parametrize(
    ("cut", "synchronous_commit"),
    [("terminated", "on"), ("cancelled", "on"), ("restarted", "on"), ("cancelled", "local")],
)
async def test_append_that_no_standby_has_is_not_acknowledged(
    pair: ReplicatedPostgres, cut: str, synchronous_commit: str
) -> None:
    """The look-up that finds its messages waits, too. They are stored again after the failover."""
    setting = f"ALTER ROLE postgres SET synchronous_commit = {synchronous_commit}"
    await fetch(pair.nodes[0].url, setting)
    async with replicated_service(pair) as service:
        primary, standby, _, chat = service
        session_id = await chat.start()
        standby.kill()
        messages = new_messages(3)
        since = await clock(primary)
        call = asyncio.ensure_future(chat.append(session_id, messages))
        await until_commits_wait(primary, since, call)
        since = await clock(primary)
        await end_wait(primary, cut)
        await until_commits_wait(primary, since, call)
        await service.fail_over()
        replies = []
        with suppress(aio.AioRpcError):  # The failover may have taken too long for it.
            replies.append(await call)
        replies.append(await chat.append(session_id, messages))
        stored = await read_valid_history(standby.url, chat.user_id, session_id)
        stored.check_contains(replies)
        assert stored.last_seq == 4


@pytest.mark.case(n=504)
async def test_append_is_acknowledged_as_new_when_the_standby_returns(
    pair: ReplicatedPostgres,
) -> None:
    async with replicated_service(pair) as (primary, standby, _, chat):
        session_id = await chat.start()
        standby.kill()
        since = await clock(primary)
        call = asyncio.ensure_future(chat.append(session_id, new_messages(3)))
        await until_commits_wait(primary, since, call)
        since = await clock(primary)
        await end_wait(primary, "cancelled")
        await until_commits_wait(primary, since, call)
        await asyncio.to_thread(standby.start)
        reply = await call
        assert [(entry.seq, entry.replayed) for entry in reply.messages] == [
            (2, False),
            (3, False),
            (4, False),
        ]
        stored = await read_valid_history(primary.url, chat.user_id, session_id)
        stored.check_contains([reply])
        assert stored.last_seq == 4


@pytest.mark.case(n=504)
@pytest.mark.parametrize("cut", ["terminated", "cancelled"])
async def test_write_that_no_standby_has_is_not_acknowledged(
    pair: ReplicatedPostgres, cut: str
) -> None:
    async with replicated_service(pair) as (primary, standby, _, chat):
        session_id, created_id = await chat.start(), new_id()
        standby.kill()
        since = await clock(primary)
        calls = [
            asyncio.ensure_future(chat.create_session(id=created_id, title="created")),
            asyncio.ensure_future(chat.update_session(["title"], id=session_id, title="updated")),
        ]
        await until_commits_wait(primary, since, *calls)
        since = await clock(primary)
        await end_wait(primary, cut)
        await until_commits_wait(primary, since, *calls)
        await asyncio.to_thread(standby.start)
        sessions = await asyncio.gather(*calls)
        assert {session.id: session.title for session in sessions} == {
            created_id: "created",
            session_id: "updated",
        }


def repeatable_requests(chat: Chat, session_id: str) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Return requests that change nothing when they are repeated: creations, then deletions."""
    stub, user_id, document_id = chat.stub, chat.user_id, new_id()
    messages = new_messages(2)
    user = user_pb2.CreateUserRequest(user=user_pb2.User(id=new_id(), name="another user"))
    document = document_pb2.CreateDocumentRequest(
        user_id=user_id,
        document=document_pb2.Document(id=document_id, title="a document"),
        chunks=[document_pb2.DocumentChunk(text="first")],
    )
    chunks = document_pb2.AppendDocumentChunksRequest(
        user_id=user_id,
        document_id=document_id,
        first_index=1,
        chunks=[document_pb2.DocumentChunk(text="second")],
    )
    created_id, fork_id = new_id(), new_id()
    deleted_user = user_pb2.DeleteUserRequest(user_id=new_id(), allow_missing=True)
    deleted_document = document_pb2.DeleteDocumentRequest(
        user_id=user_id, document_id=new_id(), allow_missing=True
    )
    deleted_session_id = new_id()
    return {
        "append": lambda: chat.append(session_id, messages),
        "create user": lambda: stub.CreateUser(user),
        "create session": lambda: chat.create_session(id=created_id, title="created"),
        "fork": lambda: chat.fork(session_id, 1, fork_id),
        "create document": lambda: stub.CreateDocument(document),
        "append chunks": lambda: stub.AppendDocumentChunks(chunks),
        "delete user": lambda: stub.DeleteUser(deleted_user),
        "delete session": lambda: chat.delete_session(deleted_session_id, allow_missing=True),
        "delete message": lambda: chat.delete(deleted_session_id, new_id(), allow_missing=True),
        "delete document": lambda: stub.DeleteDocument(deleted_document),
    }


@pytest.mark.case(n=504)
async def test_repeated_requests_wait_for_the_standby_and_reads_do_not(
    pair: ReplicatedPostgres,
) -> None:
    """The rows that they find may be stored on this server only."""
    # A connection for each of them.
    async with replicated_service(pair, db_pool_size=24) as (primary, standby, _, chat):
        session_id = await chat.start()
        requests = repeatable_requests(chat, session_id)
        for request in requests.values():
            await request()
        expected = {name: await request() for name, request in requests.items()}
        standby.kill()
        since = await clock(primary)
        calls = {name: asyncio.ensure_future(request()) for name, request in requests.items()}
        await until_commits_wait(primary, since, *calls.values())
        await chat.get_session(session_id)
        await chat.page(session_id)
        await chat.context(session_id)
        await assert_fails(chat.delete_session(new_id()), "SESSION_NOT_FOUND")
        taken_id = expected["create session"].id
        await assert_fails(chat.create_session(id=taken_id, title="another"), "ID_TAKEN")
        assert not [name for name, call in calls.items() if call.done()]
        await asyncio.to_thread(standby.start)
        replies = {name: await call for name, call in calls.items()}
    assert replies == expected
    assert all(entry.replayed for entry in replies["append"].messages)


# --- Settings of the server or the role that are weaker than the promise.


RECORD_SETTING = (
    "CREATE TABLE recorded (setting text)",
    """
    CREATE FUNCTION record_setting() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO recorded VALUES (current_setting('synchronous_commit'));
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER record_setting AFTER INSERT ON chat_messages
    FOR EACH ROW EXECUTE FUNCTION record_setting()
    """,
)


@pytest.mark.case(n=508)
@pytest.mark.parametrize(
    ("setting", "of_database", "expected"),
    [
        ("on", "off", "on"),
        ("on", "local", "on"),
        ("on", "remote_write", "on"),
        ("on", "on", "on"),
        ("on", "remote_apply", "remote_apply"),
        ("server", "off", "off"),
        ("server", "remote_apply", "remote_apply"),
    ],
)
async def test_append_raises_a_weaker_synchronous_commit_unless_the_server_decides(
    database_url: str, setting: str, of_database: str, expected: str
) -> None:
    for statement in RECORD_SETTING:
        await fetch(database_url, statement)
    name = database_name(database_url)
    await fetch(database_url, f"ALTER DATABASE {name} SET synchronous_commit = {of_database}")
    async with (
        serving(database_url, db_synchronous_commit=setting) as server,
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await chat.append(session_id, "more")
    rows = await fetch(database_url, "SELECT setting FROM recorded")
    assert [row["setting"] for row in rows] == [expected, expected]


@pytest.mark.case(n=508)
async def test_start_logs_settings_with_which_acknowledged_writes_can_be_lost(
    database_url: str, start_process: StartProcess
) -> None:
    """The tests' own server runs with `fsync` and `full_page_writes` off."""
    name = database_name(database_url)
    await fetch(database_url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    process = await start_process()
    log = process.log.read_text().splitlines()
    lines = [json.loads(line) for line in log if "weak durability" in line]
    weaknesses = {line["setting"]: line["value"] for line in lines}
    assert weaknesses == {"synchronous_commit": "off", "fsync": "off", "full_page_writes": "off"}


@pytest.fixture
async def restricted_url(cluster: Cluster, database_url: str) -> AsyncGenerator[str]:
    """Provide the connection string of a role that may not write messages to the log."""
    await fetch(database_url, "CREATE ROLE restricted LOGIN")
    await fetch(database_url, "GRANT USAGE ON SCHEMA chathistory TO restricted")
    await fetch(
        database_url,
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA chathistory TO restricted",
    )
    functions = (
        "SELECT oid::regprocedure::text FROM pg_proc WHERE proname = 'pg_logical_emit_message'"
    )
    for [function] in await fetch(database_url, functions):
        await fetch(database_url, f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
    yield database_url.replace("postgres@", "restricted@", 1)
    await fetch(database_url, "DROP OWNED BY restricted")
    await fetch(database_url, "DROP ROLE restricted")


@pytest.mark.case(n=508)
async def test_role_that_may_not_write_to_the_log_is_reported(restricted_url: str) -> None:
    """Its repeated requests fail, since they cannot wait for standbys. Others are not affected."""
    target = parse(restricted_url)
    async with serving(target) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        messages = new_messages(2)
        session_id = await chat.start(messages)
        await failure_of(chat.append(session_id, messages))
        reply = await chat.append(session_id, "more")
        assert [entry.seq for entry in reply.messages] == [3]
    description = await doctor.describe(target, 5.0)
    findings = doctor.diagnose(description, target, doctor.Pool(8, 4, 240, 12))
    [finding] = [finding for finding in findings if finding.subject == "pg_logical_emit_message"]
    assert finding.verdict is doctor.Verdict.TODO
