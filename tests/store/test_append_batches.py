"""Appends in one statement do not affect each other, also in races that rarely happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from service.errors import AlreadyExists, Conflict, DeadlineExceeded, FailedPrecondition, NotFound
from service.store.append import lane
from service.store.append.appender import Appender
from service.store.append.batches import LARGE_ITEM_BYTES
from service.store.append.request import Append, Appended, NewMessage
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.tables import SessionState
from tests.support.appends import (
    ERASED,
    Add,
    Content,
    EraseSession,
    SetState,
    Word,
    World,
    explain,
    new_message,
    new_user,
    stores,
)
from tests.support.chat import new_id
from tests.support.cluster import Cluster, fetch
from tests.support.commit_faults import arm, install
from tests.support.history import read_history, read_valid_history


class Interrupted(Database):
    """A database that runs other code between two statements of an append."""

    before: Callable[[str], Awaitable[None]]
    """Awaited before each hot statement, with its text."""

    async def fetch_once(self, statement: Any, *args: Any, **options: Any) -> Any:
        await self.before(statement.text)
        return await super().fetch_once(statement, *args, **options)


class Sessions:
    """Sessions of one user, with one lane, so that concurrent appends share a statement."""

    def __init__(self, database: Database, url: str, user_id: str) -> None:
        self.appender = Appender(database, lanes=1)
        self.url = url
        self.user_id = user_id

    def start(
        self, session_id: str, *messages: NewMessage, seconds: float = 30.0, **options: Any
    ) -> asyncio.Task[Appended]:
        """Start an append of these messages, or of one."""
        deadline = asyncio.get_running_loop().time() + seconds
        item = Append(
            self.user_id, session_id, list(messages or [new_message(new_id())]), deadline, **options
        )
        return asyncio.create_task(self.appender.append(item))

    async def new(self, count: int = 0) -> str:
        """Create a session with `count` messages."""
        session_id = new_id()
        await fetch(
            self.url,
            "INSERT INTO chat_sessions (user_id, id, fingerprint) VALUES ($1, $2, '')",
            self.user_id,
            session_id,
        )
        for _ in range(count):
            await self.start(session_id)
        return session_id

    async def stored(self, session_id: str) -> list[str]:
        """Return the ids of a session's messages, after checking the session."""
        return [
            message.id
            for message in (await read_valid_history(self.url, self.user_id, session_id)).messages
        ]


@pytest.fixture
async def store(database_url: str) -> AsyncGenerator[Sessions]:
    async with stores(database_url) as [database]:
        opened = Sessions(database, database_url, await new_user(database_url))
        yield opened
        await opened.appender.drain()


async def test_bad_items_in_a_batch_do_not_fail_the_others(store: Sessions) -> None:
    archived, used, short = await store.new(), await store.new(1), await store.new(1)
    taken = (await store.stored(used))[0]
    world = World(store.url, [store.appender.database], store.user_id, [archived, short])
    await world.perform(0, 0, 0, SetState(SessionState.ARCHIVED))
    good = [await store.new() for _ in range(4)]
    appended = [
        store.start(good[0]),
        store.start(archived),
        store.start(good[1]),
        store.start(new_id()),
        store.start(used, new_message(taken, 1)),
        store.start(used, new_message(taken)),
        store.start(good[2]),
        store.start(short, expected_last_seq=0),
        store.start(short),
        store.start(good[3], seconds=-1.0),
        store.start(good[3]),
    ]
    answers = await asyncio.gather(*appended, return_exceptions=True)
    assert [type(answer) for answer in answers] == [
        Appended,
        FailedPrecondition,
        Appended,
        NotFound,
        AlreadyExists,
        Appended,
        Appended,
        Conflict,
        Appended,
        DeadlineExceeded,
        Appended,
    ]
    assert [
        len(await store.stored(session_id)) for session_id in (*good, archived, used, short)
    ] == [
        1,
        1,
        1,
        1,
        0,
        1,
        2,
    ]


async def test_append_for_missing_user_fails_alone(store: Sessions, database_url: str) -> None:
    good, user_id = await store.new(), store.user_id
    first = store.start(good)
    store.user_id = new_id()
    second = store.start(new_id(), may_create=True)
    store.user_id = user_id
    third = store.start(good)
    answers = await asyncio.gather(first, second, third, return_exceptions=True)
    assert isinstance(answers[1], NotFound)
    assert answers[1].reason == "USER_NOT_FOUND"
    assert len(await store.stored(good)) == 2


@pytest.mark.parametrize("kind", ["40001", "40P01"])
async def test_session_that_always_fails_does_not_fail_the_batch(
    store: Sessions, kind: str
) -> None:
    await install(store.url)
    cursed, good = await store.new(), [await store.new() for _ in range(5)]
    await arm(store.url, kind, 1000, content="content 1")
    bad = store.start(cursed, new_message(new_id(), 1))
    answers = await asyncio.gather(bad, *map(store.start, good), return_exceptions=True)
    assert isinstance(answers[0], Conflict)
    assert answers[0].reason == "CONTENTION"
    assert [len(await store.stored(session_id)) for session_id in (cursed, *good)] == [
        0,
        1,
        1,
        1,
        1,
        1,
    ]


async def test_locked_session_does_not_delay_other_sessions(
    store: Sessions, cluster: Cluster
) -> None:
    """The order of events decides, not the clock: the others finish while the lock is held."""
    locked, others = await store.new(), [await store.new() for _ in range(5)]
    holder = await cluster.connect(store.appender.database.target.url.database or "")
    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", locked)
            waiting = [store.start(locked) for _ in range(3)]
            for _ in range(3):
                await asyncio.gather(*map(store.start, others))
            assert not any(task.done() for task in waiting)
        stored = await asyncio.gather(*waiting)
    finally:
        await holder.close()
    assert sorted(appended.entries[0].seq for appended in stored) == [1, 2, 3]
    assert [len(await store.stored(session_id)) for session_id in others] == [3] * 5


async def test_append_to_session_that_stays_locked_is_aborted_in_time(
    store: Sessions, cluster: Cluster
) -> None:
    locked, other = await store.new(), await store.new()
    holder = await cluster.connect(store.appender.database.target.url.database or "")
    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", locked)
            blocked = [store.start(locked, seconds=0.7) for _ in range(3)]
            answers = await asyncio.gather(*blocked, store.start(other), return_exceptions=True)
            assert all(isinstance(answer, Conflict | DeadlineExceeded) for answer in answers[:3])
            assert isinstance(answers[3], Appended)
        # No state remains: the session takes appends again, in batches with others.
        await asyncio.gather(store.start(locked), store.start(other))
    finally:
        await holder.close()
    assert len(await store.stored(locked)) == 1
    assert store.appender.queued_count == 0


async def test_append_cancelled_in_the_queue_is_not_stored(store: Sessions) -> None:
    session_id = await store.new()
    in_flight = store.start(session_id)
    await asyncio.sleep(0)
    withdrawn = [store.start(session_id) for _ in range(3)]
    remaining = store.start(session_id)
    await asyncio.sleep(0)
    for task in withdrawn:
        task.cancel()
    await asyncio.gather(in_flight, remaining)
    await store.appender.drain()
    assert len(await store.stored(session_id)) == 2


async def test_appends_cancelled_in_a_queue_hold_no_messages(store: Sessions) -> None:
    """Their calls have released the bytes, and their turn may come late."""
    appender = store.appender
    large = new_message(new_id())._replace(size=LARGE_ITEM_BYTES + 1)
    async with appender.permits(for_large_item=True).hold("somebody", None):
        session_ids = [new_id() for _ in range(3)]
        appends = [store.start(id_, large, may_create=True) for id_ in session_ids]
        while not all(appender.is_apart((store.user_id, id_)) for id_ in session_ids):
            await asyncio.sleep(0)
        for append in appends[:2]:
            append.cancel()
        await asyncio.wait(appends[:2])
        queued = [item for lane in appender._apart.values() for item in lane.queue]
        assert len([message for item in queued for message in item.messages]) == 1
        assert len([message for item in queued for message in item.pending]) == 1
    assert (await appends[2]).entries[0].seq == 1
    await appender.drain()
    assert [len(await store.stored(id_)) for id_ in session_ids[2:]] == [1]


async def test_append_cancelled_during_its_look_up_is_withdrawn(database_url: str) -> None:
    database = Interrupted(parse(database_url), hot_pool_size=1)
    looking_up, may_look_up = asyncio.Event(), asyncio.Event()
    store = Sessions(database, database_url, await new_user(database_url))

    async def before(statement: str) -> None:
        if statement == store.appender.statements.look_up.text:
            looking_up.set()
            await may_look_up.wait()

    database.before = before
    session_id = await store.new()
    message = new_message(new_id())
    first, second = store.start(session_id, message), store.start(session_id, message)
    await looking_up.wait()
    second.cancel()
    await asyncio.wait([second])
    may_look_up.set()
    assert (await first).entries[0].seq == 1
    await store.appender.drain()
    assert await store.stored(session_id) == [message.id]
    await database.close()


async def test_append_cancelled_in_flight_is_stored(
    store: Sessions, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "LOCK_TIMEOUT", "30s")
    session_id = await store.new()
    holder = await cluster.connect(store.appender.database.target.url.database or "")
    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", session_id)
            in_flight = store.start(session_id)
            while not await holder.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
            in_flight.cancel()
            await asyncio.wait([in_flight])
    finally:
        await holder.close()
    await store.appender.drain()
    assert len(await store.stored(session_id)) == 1


async def test_retry_during_its_first_attempt_is_a_replay(database_url: str) -> None:
    """Both stores send the message before either commits; a constraint stops the second."""
    async with stores(database_url, database_url) as databases:
        world = World(database_url, databases, await new_user(database_url))
        await world.perform(0, 0, 0, Add((Word(0, 0),), may_create=True))
        done = await asyncio.gather(
            *(world.perform(n % 2, 0, 0, Add((Word(1, 0), Word(2, 0)))) for n in range(10))
        )
        _, content = await world.content(0)
        assert content == Content(words=(Word(0, 0), Word(1, 0), Word(2, 0)))
        assert sorted(operation.answer for operation in done) == (
            [("added", False, ((2, False), (3, False)))]
            + [("added", False, ((2, True), (3, True)))] * 9
        )


@pytest.mark.parametrize("is_created_again", [False, True], ids=["deleted", "created again"])
async def test_messages_found_in_a_deleted_session_are_stored_again(
    database_url: str, is_created_again: bool
) -> None:
    """The look-up and the statement must apply to the same session."""
    first, second = Word(0, 0), Word(1, 0)
    database = Interrupted(parse(database_url))
    async with stores(database_url) as [other]:
        world = World(database_url, [database, other], await new_user(database_url))
        is_looked_up = is_deleted = False

        async def delete_after_look_up(statement: str) -> None:
            nonlocal is_looked_up, is_deleted
            if is_looked_up and not is_deleted and "INSERT" in statement:
                is_deleted = True
                assert (await world.perform(1, 0, 0, EraseSession())).answer == ("erased", True)
                if is_created_again:
                    await world.perform(1, 0, 0, Add((Word(2, 0), Word(3, 0)), may_create=True))
            is_looked_up = is_looked_up or "m.fingerprint" in statement

        database.before = delete_after_look_up
        try:
            await world.perform(1, 0, 0, Add((first,), may_create=True))
            done = await world.perform(0, 0, 0, Add((first, second), may_create=True))
            _, content = await world.content(0)
        finally:
            await database.close()
        assert is_deleted
        again = Content(words=(Word(2, 0), Word(3, 0)), has_tombstone=True)
        start = again if is_created_again else ERASED
        assert explain(start, content, [done]), (done, content)


async def test_session_deleted_during_a_statement_is_not_created_again(
    database_url: str, cluster: Cluster
) -> None:
    """The statement sees the session and waits for its row, which is deleted in the meantime."""
    async with stores(database_url) as [database]:
        store = Sessions(database, database_url, await new_user(database_url))
        deleted, good = await store.new(1), await store.new()
        holder = await cluster.connect(database.target.url.database or "")
        try:
            async with holder.transaction():
                await holder.execute("DELETE FROM chat_sessions WHERE id = $1", deleted)
                appended = [store.start(deleted), store.start(good)]
                while not await holder.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    await asyncio.sleep(0.005)
            answers = await asyncio.gather(*appended, return_exceptions=True)
        finally:
            await holder.close()
        assert isinstance(answers[0], NotFound)
        assert await read_history(database_url, store.user_id, deleted) is None
        assert len(await store.stored(good)) == 1


async def test_create_times_follow_seq_when_the_clock_goes_back(store: Sessions) -> None:
    """The clock of another replica, or of this one before its correction, was an hour ahead."""
    session_id = await store.new(1)
    for column, table in (("updated_at", "chat_sessions"), ("created_at", "chat_messages")):
        key = "id" if table == "chat_sessions" else "session_id"
        await fetch(
            store.url,
            f"UPDATE {table} SET {column} = {column} + interval '1 hour' WHERE {key} = $1",
            session_id,
        )
    ahead = (await read_valid_history(store.url, store.user_id, session_id)).messages[0].created_us
    for _ in range(3):
        await asyncio.gather(*(store.start(session_id) for _ in range(3)))
    history = await read_valid_history(store.url, store.user_id, session_id)
    assert [message.created_us >= ahead for message in history.messages] == [True] * 10
