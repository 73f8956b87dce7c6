"""A user's many or large appends do not delay those of other users: the order of statements."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import pytest

from service.store.append.appender import (
    MAX_APART_STATEMENTS,
    MAX_APART_STATEMENTS_PER_USER,
    Appender,
)
from service.store.append.request import Append, Appended, NewMessage
from service.store.db.database import Database
from service.store.db.dsn import parse
from tests.support.appends import new_message, new_user
from tests.support.chat import new_id
from tests.support.cluster import connected_to
from tests.support.history import read_valid_history

KIB = 1024
LARGE = 3_900 * KIB
SMALL = 300
MAX_BATCH_BYTES = 512 * KIB


@dataclass
class Batch:
    """One append statement: the owners and sizes of its messages, in order."""

    owner_ids: list[str]
    sizes: list[int]
    large_in_flight: int
    """Statements with a message of more than half a batch in flight, with this one."""

    @property
    def size(self) -> int:
        return sum(self.sizes)


class Recorder(Database):
    """A database that records append statements in the order in which they start.

    They wait until `opened` is set, so that a test can fill the queues.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.opened = asyncio.Event()
        self.batches: list[Batch] = []
        self._large_in_flight = 0

    async def fetch_once(self, statement: Any, *args: Any, **options: Any) -> Any:
        if "INSERT INTO chathistory.chat_messages" not in statement.text:
            return await super().fetch_once(statement, *args, **options)
        owner_ids, sizes = args[13], args[24]
        is_large = max(sizes) > MAX_BATCH_BYTES / 2
        self._large_in_flight += is_large
        self.batches.append(Batch(owner_ids, sizes, self._large_in_flight))
        try:
            await self.opened.wait()
            return await super().fetch_once(statement, *args, **options)
        finally:
            self._large_in_flight -= is_large

    def position(self, owner_id: str) -> int:
        """Return the number of statements that started before the first one of a user."""
        return next(n for n, batch in enumerate(self.batches) if owner_id in batch.owner_ids)


class Users:
    """Two users with sessions on one lane, so that every append waits in the same queue."""

    def __init__(self, database: Recorder, url: str, attacker_id: str, user_id: str) -> None:
        self.database = database
        self.appender = Appender(database, lanes=1)
        self.url = url
        self.attacker_id = attacker_id
        self.user_id = user_id

    def start(
        self, owner_id: str, size: int, *, session_id: str = "", count: int = 1
    ) -> asyncio.Task[Appended]:
        """Start an append of `count` messages of `size` bytes to a session, or to a new one."""
        append = Append(
            owner_id,
            session_id or new_id(),
            [_message(size) for _ in range(count)],
            asyncio.get_running_loop().time() + 60,
            may_create=True,
        )
        return asyncio.create_task(self.appender.append(append))

    def attack(self, count: int, size: int, **options: Any) -> list[asyncio.Task[Appended]]:
        return [self.start(self.attacker_id, size, **options) for _ in range(count)]

    async def settle(self) -> None:
        """Wait until every append is queued, and the first statements have been sent."""
        for _ in range(300):
            await asyncio.sleep(0)


def _message(size: int) -> NewMessage:
    return new_message(new_id())._replace(content="x" * size, size=size)


@pytest.fixture
async def users(database_url: str) -> AsyncGenerator[Users]:
    database = Recorder(parse(database_url))
    opened = Users(
        database, database_url, await new_user(database_url), await new_user(database_url)
    )
    yield opened
    database.opened.set()
    await opened.appender.drain()
    await database.close()


async def test_small_append_waits_for_one_statement_of_another_users_small_appends(
    users: Users,
) -> None:
    flood = users.attack(3000, SMALL)
    await users.settle()
    append = users.start(users.user_id, SMALL)
    await users.settle()
    users.database.opened.set()
    await asyncio.gather(append, *flood)
    assert users.database.position(users.user_id) == 1


async def test_small_append_waits_for_one_statement_of_another_users_medium_appends(
    users: Users,
) -> None:
    flood = users.attack(60, 200 * KIB)
    await users.settle()
    append = users.start(users.user_id, SMALL)
    await users.settle()
    users.database.opened.set()
    await asyncio.gather(append, *flood)
    assert users.database.position(users.user_id) == 1
    assert max(batch.size for batch in users.database.batches) <= MAX_BATCH_BYTES


async def test_small_append_does_not_wait_for_large_appends(users: Users) -> None:
    """Only one of the large appends has been sent when the small one starts."""
    flood = users.attack(12, LARGE)
    await users.settle()
    append = users.start(users.user_id, SMALL)
    await users.settle()
    assert [batch.owner_ids for batch in users.database.batches] == [
        [users.attacker_id],
        [users.user_id],
    ]
    users.database.opened.set()
    await asyncio.gather(append, *flood)


async def test_statement_has_at_most_one_large_append_and_one_runs_at_a_time(users: Users) -> None:
    session_id = new_id()
    appends = users.attack(4, LARGE) + users.attack(4, 300 * KIB, session_id=session_id)
    appends += users.attack(20, SMALL, session_id=session_id)
    await users.settle()
    users.database.opened.set()
    await asyncio.gather(*appends)
    batches = users.database.batches
    assert all(len(batch.sizes) == 1 for batch in batches if batch.size > MAX_BATCH_BYTES / 2)
    assert {batch.large_in_flight for batch in batches} <= {0, 1}
    assert sum(len(batch.sizes) for batch in batches) == 28


async def test_large_appends_of_users_alternate(users: Users) -> None:
    flood = users.attack(12, LARGE)
    await users.settle()
    appends = [users.start(users.user_id, LARGE) for _ in range(3)]
    await users.settle()
    users.database.opened.set()
    await asyncio.gather(*flood, *appends)
    order = [batch.owner_ids[0] for batch in users.database.batches]
    own = [n for n, owner_id in enumerate(order) if owner_id == users.user_id]
    # One was sent before the user's first, and another one was next by then.
    assert own[0] <= 2
    assert [after - before for before, after in itertools.pairwise(own)] == [2, 2]


async def test_large_appends_of_cancelled_callers_are_not_sent(users: Users) -> None:
    abandoned = users.attack(12, LARGE)
    await users.settle()
    append = users.start(users.user_id, LARGE)
    await users.settle()
    for task in abandoned:
        task.cancel()
    await asyncio.wait(abandoned)
    users.database.opened.set()
    await append
    await users.appender.drain()
    # The first one was in flight already.
    assert [batch.owner_ids[0] for batch in users.database.batches] == [
        users.attacker_id,
        users.user_id,
    ]


async def test_many_small_appends_are_served_per_turn_of_a_medium_one(users: Users) -> None:
    """Turns have a size, so that large items give their user no greater share."""
    flood = users.attack(20, 200 * KIB)
    appends = [users.start(users.user_id, SMALL) for _ in range(50)]
    await users.settle()
    users.database.opened.set()
    await asyncio.gather(*flood, *appends)
    first = users.database.position(users.user_id)
    assert first <= 1
    assert users.database.batches[first].owner_ids.count(users.user_id) == 50


async def test_appends_of_any_size_to_a_session_keep_their_order(users: Users) -> None:
    session_id = new_id()
    sizes = [SMALL, LARGE, SMALL, SMALL, 200 * KIB, LARGE, 300 * KIB, SMALL, 200 * KIB, SMALL]
    appends = [users.start(users.user_id, size, session_id=session_id) for size in sizes]
    flood = users.attack(20, 200 * KIB)
    await users.settle()
    users.database.opened.set()
    stored = await asyncio.gather(*appends)
    await asyncio.gather(*flood)
    assert [appended.entries[0].seq for appended in stored] == list(range(1, len(sizes) + 1))
    history = await read_valid_history(users.url, users.user_id, session_id)
    assert len(history.messages) == len(sizes)
    # No state remains: the session shares statements with others again.
    assert not users.appender.is_apart((users.user_id, session_id))


async def test_few_appends_of_many_users_share_one_statement(users: Users) -> None:
    first = users.start(users.attacker_id, SMALL)
    await users.settle()
    appends = [
        users.start(owner_id, SMALL)
        for owner_id in (users.attacker_id, users.user_id)
        for _ in range(32)
    ]
    await users.settle()
    users.database.opened.set()
    await asyncio.gather(first, *appends)
    assert [len(batch.sizes) for batch in users.database.batches] == [1, 64]


async def test_appends_to_a_session_that_is_being_deleted_share_no_statement(users: Users) -> None:
    """The appender knows of the deletion, so that not even the first statement waits for it."""
    session_id = new_id()
    users.appender.contention.add_session((users.attacker_id, session_id))
    appends = users.attack(8, SMALL, session_id=session_id)
    appends += [users.start(users.user_id, SMALL) for _ in range(8)]
    await users.settle()
    users.database.opened.set()
    await asyncio.gather(*appends)
    assert all(len(set(batch.owner_ids)) == 1 for batch in users.database.batches)


async def test_user_whose_session_stays_locked_shares_no_more_statements(users: Users) -> None:
    """Another replica holds the lock: one shared statement waits for it, and no later one."""
    users.database.opened.set()
    locked = new_id()
    await users.start(users.attacker_id, SMALL, session_id=locked)
    async with connected_to(users.url) as holder, holder.transaction():
        await holder.execute("SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", locked)
        waiting = users.start(users.attacker_id, SMALL, session_id=locked)
        await users.start(users.user_id, SMALL)
        while not users.appender.contention.covers((users.attacker_id, locked)):
            await asyncio.sleep(0.01)
        del users.database.batches[:]
        other_session = users.start(users.attacker_id, SMALL)
        await asyncio.gather(users.start(users.user_id, SMALL), other_session)
    await waiting
    await asyncio.gather(users.start(users.attacker_id, SMALL), users.start(users.user_id, SMALL))
    assert not users.appender.contention.covers((users.user_id, new_id()))
    assert all(len(set(batch.owner_ids)) == 1 for batch in users.database.batches)


async def test_locked_sessions_of_a_user_have_few_statements_in_flight(users: Users) -> None:
    users.appender.contention.add_user(users.attacker_id)
    appends = users.attack(12, SMALL)
    await users.settle()
    assert len(users.database.batches) == MAX_APART_STATEMENTS_PER_USER < MAX_APART_STATEMENTS
    users.database.opened.set()
    await asyncio.gather(*appends)


async def test_contention_is_forgotten(users: Users, monkeypatch: pytest.MonkeyPatch) -> None:
    contention = users.appender.contention
    contention.add_session((users.attacker_id, new_id()))
    monkeypatch.setattr("service.store.append.contention.CONTENTION_S", -1.0)
    key = (users.user_id, new_id())
    contention.add_session(key)
    assert not contention.covers(key)
    contention._ends = dict.fromkeys(contention._ends, 0.0)
    contention.add_user(users.user_id)
    assert len(contention) == 0
