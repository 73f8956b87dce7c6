"""A late retry of the append that started a session does not restore it after its deletion."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2, user_pb2

from service.server import Server
from service.store import session_tombstones, sessions
from service.store.append.appender import Appender
from service.store.append.request import Append, Appended
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.db.hot_pool import Statement
from tests.rpc.test_append_log import reason_of, wait_for_lock
from tests.support import appends
from tests.support.appends import new_user
from tests.support.chat import Chat, new_id, new_message
from tests.support.cluster import Cluster, connected_to, fetch
from tests.support.failures import assert_fails
from tests.support.servers import AsyncStub
from tests.support.statements import SentStatements


async def tombstones(url: str) -> list[tuple[str, str]]:
    """Return the tombstones that refuse retries: user id, session id."""
    rows = await fetch(
        url,
        "SELECT user_id::text, session_id::text FROM session_tombstones"
        " WHERE deleted_at > now() - interval '24 hours' ORDER BY 1, 2",
    )
    return [tuple(row) for row in rows]


async def age(url: str, interval: str) -> None:
    """Make all tombstones older."""
    await fetch(
        url, "UPDATE session_tombstones SET deleted_at = deleted_at - $1::text::interval", interval
    )


async def delete_user(stub: AsyncStub, user_id: str) -> None:
    await stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=user_id))


# --- Which appends are refused.


async def test_late_retry_of_an_append_without_session_id_is_refused(chat: Chat) -> None:
    sent = [new_message("hello"), new_message("again")]
    session_id = await chat.start(sent)
    assert (await chat.append("", sent)).messages[0].replayed
    await chat.delete_session(session_id)
    for messages in (sent, sent[:1]):
        await assert_fails(chat.append("", messages), "SESSION_NOT_FOUND", session_id=session_id)
    await assert_fails(chat.append("", sent, expected_last_seq=0), "SESSION_NOT_FOUND")
    await assert_fails(chat.get_session(session_id), "SESSION_NOT_FOUND")
    # A new conversation starts as before.
    assert (await chat.append("", "hello")).session_created


async def test_explicit_session_id_starts_a_deleted_session_again(chat: Chat) -> None:
    sent = [new_message("hello")]
    session_id = await chat.start(sent)
    await chat.delete_session(session_id)
    reply = await chat.append(session_id, [new_message("new")], create_if_missing=True)
    assert reply.session_created
    # The retry would add the erased message to the new session.
    await assert_fails(chat.append("", sent), "SESSION_NOT_FOUND")
    assert [message.content for message in await chat.all(session_id)] == ["new"]
    # After the caller has stored it again, the retry is a replay.
    await chat.append(session_id, sent)
    assert [entry.replayed for entry in (await chat.append("", sent)).messages] == [True]


async def test_create_session_starts_a_deleted_session_again(chat: Chat) -> None:
    session_id = await chat.start([new_message("hello")])
    await chat.delete_session(session_id)
    assert (await chat.create_session(id=session_id)).last_seq == 0
    assert (await chat.append(session_id, "new")).messages[0].seq == 1


async def test_tombstone_refuses_for_24_hours(chat: Chat, database_url: str) -> None:
    sent = [new_message("hello")]
    session_id = await chat.start(sent)
    await chat.delete_session(session_id)
    await age(database_url, "23 hours 59 minutes")
    await assert_fails(chat.append("", sent), "SESSION_NOT_FOUND")
    await age(database_url, "2 minutes")
    assert (await chat.append("", sent)).session_created
    await chat.delete_session(session_id)
    await assert_fails(chat.append("", sent), "SESSION_NOT_FOUND")


async def test_only_sessions_with_a_derived_id_leave_a_tombstone(
    chat: Chat, database_url: str
) -> None:
    explicit = (await chat.create_session()).id
    chosen = await chat.create_session(id=new_id())
    derived = await chat.start()
    for session_id in (explicit, chosen.id, derived):
        await chat.delete_session(session_id)
    assert await tombstones(database_url) == [(chat.user_id, derived)]


async def test_deletion_of_a_missing_session_leaves_no_tombstone(
    chat: Chat, database_url: str
) -> None:
    message = new_message("hello")
    session_id = str(uuid.uuid5(uuid.UUID(chat.user_id), message.id))
    await chat.delete_session(session_id, allow_missing=True)
    assert (await chat.append("", [message])).session_id == session_id


async def test_tombstone_of_another_user_refuses_nothing(
    chat: Chat, other: Chat, database_url: str
) -> None:
    message = new_message("hello")
    session_id = str(uuid.uuid5(uuid.UUID(chat.user_id), message.id))
    await other.create_session(id=session_id)
    await other.delete_session(session_id)
    assert await tombstones(database_url) == [(other.user_id, session_id)]
    assert (await chat.append("", [message])).session_created


async def test_retry_after_the_user_was_created_again_is_refused(chat: Chat) -> None:
    """An account is erased and created again under the id that the caller's system uses."""
    sent = [new_message("hello")]
    await chat.start(sent)
    await delete_user(chat.stub, chat.user_id)
    await assert_fails(chat.append("", sent), "USER_NOT_FOUND")
    await chat.stub.CreateUser(user_pb2.CreateUserRequest(user=user_pb2.User(id=chat.user_id)))
    await assert_fails(chat.append("", sent), "SESSION_NOT_FOUND")
    assert (await chat.append("", "hello")).session_created


async def test_appends_that_cannot_be_retried_without_session_id_do_not_touch_tombstones(
    chat: Chat, session: session_pb2.Session, cluster: Cluster, database_url: str
) -> None:
    sent = SentStatements(cluster, database_url)
    await chat.append(session.id, "hello")
    await chat.append(new_id(), "hello", create_if_missing=True)
    await chat.start([message_pb2.Message(role=message_pb2.ROLE_USER, content="no id")])
    statements = [
        logged.sql for logged in sent.so_far() if "INSERT INTO chat_messages" in logged.sql
    ]
    assert len(statements) == 3
    assert not any("session_tombstones" in statement for statement in statements)


# --- Concurrent deletions.


class Store:
    """An appender with one lane, so that concurrent appends share a statement."""

    def __init__(self, database: Database, url: str, user_id: str, *, search: bool) -> None:
        self.database = database
        self.appender = Appender(database, lanes=1, search_enabled=search)
        self.url = url
        self.user_id = user_id
        self.search = search

    def start(
        self, message_id: str, session_id: str = "", *, sent_id: str = "", **options: Any
    ) -> asyncio.Task[Appended]:
        """Start an append of a message to a session, or without a session id.

        `sent_id` is the id of another message to send instead.
        """
        append = Append(
            self.user_id,
            session_id or self.session_id(message_id),
            [appends.new_message(sent_id or message_id)],
            asyncio.get_running_loop().time() + 30,
            may_create=True,
            has_derived_id=not session_id,
            **options,
        )
        return asyncio.create_task(self.appender.append(append))

    def session_id(self, message_id: str) -> str:
        """Return the id of the session that an append without a session id starts."""
        return str(uuid.uuid5(uuid.UUID(self.user_id), message_id))

    async def delete(self, session_id: str) -> bool:
        return await self.database.write(
            lambda connection: sessions.delete(
                connection, self.user_id, session_id, search_enabled=self.search
            ),
            owner_id=self.user_id,
            deadline=asyncio.get_running_loop().time() + 30,
        )

    async def stored(self) -> dict[str, int]:
        """Return the number of messages of each session."""
        rows = await fetch(
            self.url,
            "SELECT id::text, message_count FROM chat_sessions WHERE user_id = $1",
            self.user_id,
        )
        return dict(map(tuple, rows))


@pytest.fixture(params=[False, True], ids=["without search", "with search"])
async def store(request: pytest.FixtureRequest, database_url: str) -> AsyncGenerator[Store]:
    database = Database(parse(database_url))
    opened = Store(database, database_url, await new_user(database_url), search=request.param)
    yield opened
    await opened.appender.drain()
    await database.close()


async def test_retry_that_waits_for_the_deletion_is_refused(store: Store) -> None:
    """The statement sees the session, and no tombstone, when it starts to wait."""
    message_id = new_id()
    session_id = store.session_id(message_id)
    await store.start(message_id)
    other = new_id()
    async with connected_to(store.url) as deleter:
        async with deleter.transaction():
            await deleter.execute("DELETE FROM chat_sessions WHERE id = $1", session_id)
            await deleter.execute(
                "INSERT INTO session_tombstones VALUES ($1, $2, now())"
                " ON CONFLICT (user_id, session_id) DO UPDATE SET deleted_at = now()",
                store.user_id,
                session_id,
            )
            retry, unrelated = store.start(message_id), store.start(other)
            await wait_for_lock(store.url)
        assert await reason_of_append(retry) == "SESSION_NOT_FOUND"
    await unrelated
    assert await store.stored() == {store.session_id(other): 1}


async def reason_of_append(task: asyncio.Task[Appended]) -> str | None:
    try:
        await task
    except Exception as error:  # noqa: BLE001 - the reason is compared
        return getattr(error, "reason", repr(error))
    return None


@pytest.mark.parametrize("is_created_again", [False, True], ids=["deleted", "created again"])
async def test_session_created_and_deleted_during_the_retry_is_not_restored(
    store: Store, monkeypatch: pytest.MonkeyPatch, is_created_again: bool
) -> None:
    """The statement's snapshot shows neither the session nor its deletion."""
    monkeypatch.setattr("service.store.append.lane.LOCK_TIMEOUT", "30s")
    message_id = new_id()
    session_id = store.session_id(message_id)
    # Sessions are locked in the order of their ids: the statement waits for this one first.
    first_id = "00000000-0000-4000-8000-000000000001"
    await store.start(new_id(), first_id)
    replica = Appender(store.database, search_enabled=store.search)
    async with connected_to(store.url) as holder:
        async with holder.transaction():
            await holder.execute("SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", first_id)
            unrelated, retry = store.start(new_id(), first_id), store.start(message_id)
            await wait_for_lock(store.url)
            lane, store.appender = store.appender, replica
            await store.start(message_id)
            assert await store.delete(session_id)
            if is_created_again:
                await store.start(new_id(), session_id)
            await replica.drain()
            store.appender = lane
        assert await reason_of_append(retry) == "SESSION_NOT_FOUND"
    await unrelated
    assert await store.stored() == {first_id: 2} | ({session_id: 1} if is_created_again else {})


async def test_session_deleted_before_the_look_up_of_a_refused_retry_is_not_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement has refused the retry because of `expected_last_seq`."""
    message_id = new_id()
    session_id = store.session_id(message_id)
    await store.start(message_id)
    await store.start(new_id(), session_id)
    fetch_once = store.database.fetch_once

    async def delete_before_look_up(statement: Statement, *args: Any, **options: Any) -> Any:
        if statement is store.appender.statements.look_up:
            await store.delete(session_id)
        return await fetch_once(statement, *args, **options)

    monkeypatch.setattr(store.database, "fetch_once", delete_before_look_up)
    retry = store.start(message_id, sent_id=new_id(), expected_last_seq=1)
    assert await reason_of_append(retry) == "SESSION_NOT_FOUND"


async def test_retries_racing_a_deletion_never_restore_the_session(chat: Chat) -> None:
    for _ in range(10):
        sent = [new_message("hello")]
        session_id = await chat.start(sent)
        calls = [reason_of(chat.append("", sent)) for _ in range(6)]
        calls.insert(3, reason_of(chat.delete_session(session_id)))
        assert set(await asyncio.gather(*calls)) <= {None, "SESSION_NOT_FOUND", "CONTENTION"}
        await assert_fails(chat.get_session(session_id), "SESSION_NOT_FOUND")


async def test_refused_retry_does_not_affect_other_appends_of_its_batch(store: Store) -> None:
    message_id, other = new_id(), new_id()
    session_id = store.session_id(message_id)
    await store.start(message_id)
    await store.delete(session_id)
    running = store.start(new_id())
    await asyncio.sleep(0)
    batch = [
        store.start(message_id),
        store.start(other),
        store.start(new_id(), session_id),
        store.start(message_id),
        store.start(new_id(), session_id),
    ]
    reasons = await asyncio.gather(*map(reason_of_append, [running, *batch]))
    assert reasons == [None, "SESSION_NOT_FOUND", None, None, "SESSION_NOT_FOUND", None]
    assert (await store.stored())[session_id] == 2


async def test_identical_appends_without_session_id_start_one_session(store: Store) -> None:
    message_id = new_id()
    replies = await asyncio.gather(*(store.start(message_id) for _ in range(20)))
    assert sorted(reply.session_created for reply in replies) == [False] * 19 + [True]
    assert await store.stored() == {store.session_id(message_id): 1}


# --- The purge.


async def count_rows(url: str) -> int:
    [row] = await fetch(url, "SELECT count(*) FROM session_tombstones")
    return int(row[0])


async def purge(server: Server) -> None:
    """Wait for the purge that a write starts when one is due."""
    while (task := server.appender.tombstones.task) is not None:
        await asyncio.wait([task])


async def test_write_purges_expired_tombstones_in_slices(
    server: Server, chat: Chat, database_url: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_tombstones, "ROWS_PER_PURGE", 2)
    expired = [await chat.start() for _ in range(5)]
    for session_id in expired:
        await chat.delete_session(session_id)
    await age(database_url, "25 hours")
    kept = await chat.start()
    await chat.delete_session(kept)
    assert await count_rows(database_url) == 6
    server.appender.tombstones.due_at = 0
    sent = SentStatements(cluster, database_url)
    await chat.start()
    await purge(server)
    purges = [logged for logged in sent.so_far() if "DELETE FROM session_tombstones" in logged.sql]
    assert len(purges) == 4  # The row of the last append has no meaning, and is purged, too.
    assert await tombstones(database_url) == [(chat.user_id, kept)]
    assert await count_rows(database_url) == 1


async def test_deletion_of_a_session_starts_a_purge(
    server: Server, chat: Chat, database_url: str
) -> None:
    await chat.delete_session(await chat.start())
    await age(database_url, "25 hours")
    session = await chat.create_session()
    server.appender.tombstones.due_at = 0
    await chat.delete_session(session.id)
    await purge(server)
    assert await count_rows(database_url) == 0


async def test_purge_is_limited_to_one_per_interval(
    server: Server, chat: Chat, database_url: str, cluster: Cluster
) -> None:
    sent = SentStatements(cluster, database_url)
    server.appender.tombstones.due_at = 0
    for _ in range(5):
        await chat.start()
        await purge(server)
    purges = [logged for logged in sent.so_far() if "DELETE FROM session_tombstones" in logged.sql]
    assert len(purges) == 1


async def test_appends_to_existing_sessions_start_no_purge(
    server: Server, chat: Chat, session: session_pb2.Session
) -> None:
    server.appender.tombstones.due_at = 0
    await chat.append(session.id, "hello")
    assert server.appender.tombstones.task is None
    assert server.appender.tombstones.due_at == 0


async def test_tombstones_of_a_deleted_user_are_purged_after_24_hours(
    server: Server, chat: Chat, other: Chat, database_url: str
) -> None:
    session_id = await chat.start()
    await delete_user(chat.stub, chat.user_id)
    assert await tombstones(database_url) == [(chat.user_id, session_id)]
    await age(database_url, "25 hours")
    server.appender.tombstones.due_at = 0
    await other.start()
    await purge(server)
    assert await count_rows(database_url) == 0
