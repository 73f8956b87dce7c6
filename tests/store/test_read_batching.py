"""ReadBatcher: concurrent reads share statements, and each gets its own rows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from sqlalchemy import Integer, Select, Text, func, literal_column, select

from service.server import Server
from service.store import context, message_pages, watch_pages
from service.store.db import read_batching
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.db.hot_pool import Record, Statement
from service.store.db.read_batching import BatchedRead, Parameters, ReadBatcher, Types
from service.store.db.recent_keys import RecentKeys
from tests.support.chat import SYSTEM, Chat, new_message, new_messages

N = {"n": Integer()}


def twice(parameters: Parameters) -> Select[Any]:
    query = select((parameters["n"] * literal_column("2")).label("twice"))
    return query.correlate(*parameters.tables)


def tenth(parameters: Parameters) -> Select[Any]:
    query = select((literal_column("10") / parameters["n"]).label("tenth"))
    return query.correlate(*parameters.tables)


class RecordingDatabase(Database):
    """A database that records the texts of the hot statements."""

    texts: list[str]

    async def fetch_once(self, statement: Statement, *args: object, **options: Any) -> list[Record]:
        self.texts.append(statement.text)
        return await super().fetch_once(statement, *args, **options)


@pytest.fixture
async def database(database_url: str) -> AsyncGenerator[RecordingDatabase]:
    database = RecordingDatabase(parse(database_url))
    database.texts = []
    yield database
    await database.close()


async def ask(reads: ReadBatcher, read: BatchedRead, numbers: range) -> list[int]:
    deadline = asyncio.get_running_loop().time() + 30
    answers = await asyncio.gather(*(reads.fetch(read, deadline, n=n) for n in numbers))
    return [row[0] for [row] in answers]


async def test_concurrent_reads_share_statements_and_get_their_own_rows(
    database: RecordingDatabase,
) -> None:
    read = BatchedRead(twice, N)
    reads = ReadBatcher(database)
    assert await ask(reads, read, range(200)) == [2 * n for n in range(200)]
    assert len(database.texts) < 200 / read_batching.MAX_BATCH_SIZE + 10
    database.texts.clear()
    for n in range(5):
        assert await ask(reads, read, range(n, n + 1)) == [2 * n]
    assert database.texts[-1] == read.single.text, "a read that arrives alone is sent alone"


async def test_unsupported_batched_statement_is_never_sent_again(
    database: RecordingDatabase,
) -> None:
    read = BatchedRead(twice, N)
    # PostgreSQL's "feature not supported", with which Citus rejects the batched statement.
    read.batched = Statement.from_text("SELECT 1 UNION SELECT 2 FOR UPDATE")
    reads = ReadBatcher(database)
    assert await ask(reads, read, range(40)) == [2 * n for n in range(40)]
    assert read.batched.text in database.texts
    database.texts.clear()
    assert await ask(reads, read, range(40)) == [2 * n for n in range(40)]
    assert set(database.texts) == {read.single.text}


async def test_failed_batch_fails_only_reads_that_fail_alone(
    database: RecordingDatabase,
) -> None:
    read = BatchedRead(tenth, N)
    reads = ReadBatcher(database)
    deadline = asyncio.get_running_loop().time() + 30
    answers = await asyncio.gather(
        *(reads.fetch(read, deadline, n=n) for n in (1, 2, 0, 5, 10)), return_exceptions=True
    )
    assert isinstance(answers[2], Exception)
    assert [
        row[0] for answer in answers if not isinstance(answer, BaseException) for row in answer
    ] == [10, 5, 2, 1]


READS = {
    "the opening of a context": context._FIRST_READ,
    "older messages of a context": context._OLDER_READ,
    "a page forwards": message_pages._AFTER_SEQ,
    "a page backwards": message_pages._BEFORE_SEQ,
    "a page of a watch": watch_pages.NEXT_PAGE,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
async def test_single_and_batched_statement_return_the_same_rows(
    server: Server, chat: Chat, other: Chat, read: BatchedRead
) -> None:
    requests = []
    for user in (chat, other):
        for count, limit in ((0, 5), (3, 2), (12, 50)):
            session = await user.create_session(title=f"{count} messages")
            if count:
                await user.append(session.id, [new_message("rules", SYSTEM), *new_messages(count)])
            requests += [
                {
                    "user_id": user.user_id,
                    "session_id": session.id,
                    "session_created_us": session.create_time.ToMicroseconds(),
                    "seq": seq,
                    "seen_seq": seq,
                    "seen_created_us": seen_created_us,
                    "limit": limit,
                }
                for seq in (0, 7, message_pages.MAX_SEQ)
                for seen_created_us in (0, 1)
            ]
    arguments = [
        read.single.bind(**{name: request[name] for name in read.single.names})
        for request in requests
    ]
    single = [await server.database.fetch_once(read.single, *values) for values in arguments]
    batched = await server.database.fetch_once(
        read.batched, list(range(len(arguments))), *map(list, zip(*arguments, strict=True))
    )
    rows = [[tuple(row)[1:] for row in batched if row[0] == n] for n in range(len(arguments))]
    assert any(rows)
    assert rows == [[tuple(row) for row in result] for result in single]


# --- Fairness between users.

OWNED: Types = {"user_id": Text(), "n": Integer(), "limit": Integer()}


def numbers(parameters: Parameters) -> Select[Any]:
    """Select the numbers up to `n`, each with a size of 1,000 bytes."""
    series = (
        func.generate_series(literal_column("1"), parameters["n"])
        .table_valued("number")
        .render_derived()
    )
    query = select(series.c.number, literal_column("1000").label("size"), parameters["user_id"])
    query = query.select_from(series).limit(parameters["limit"])
    return query.correlate(*parameters.tables)


LARGE_N = read_batching.LARGE_ROWS + 1
MANY_BYTES_N = read_batching.LARGE_BYTES // 1000 + 1


class HeldDatabase(RecordingDatabase):
    """A database that records the users of each statement, and holds them until `release`."""

    def __init__(self, url: str) -> None:
        super().__init__(parse(url))
        self.texts = []
        self.owners: list[list[str]] = []
        self.released = asyncio.Event()
        self.in_flight: Counter[str] = Counter()
        self.max_in_flight: Counter[str] = Counter()

    async def fetch_once(self, statement: Statement, *args: Any, **options: Any) -> list[Record]:
        owners = next(
            [value] if isinstance(value, str) else value
            for value in args
            if isinstance(value, str) or isinstance(value[0] if value else None, str)
        )
        self.owners.append(owners)
        self.in_flight.update(owners)
        for owner in owners:
            self.max_in_flight[owner] = max(self.max_in_flight[owner], self.in_flight[owner])
        await self.released.wait()
        try:
            return await super().fetch_once(statement, *args, **options)
        finally:
            self.in_flight.subtract(owners)


@pytest.fixture
async def held(database_url: str) -> AsyncGenerator[HeldDatabase]:
    database = HeldDatabase(database_url)
    yield database
    await database.close()


def start(
    reads: ReadBatcher, read: BatchedRead, owner_id: str, n: int, limit: int | None = None
) -> asyncio.Task[Any]:
    deadline = asyncio.get_running_loop().time() + 30
    return asyncio.ensure_future(
        reads.fetch(read, deadline, user_id=owner_id, n=n, limit=n if limit is None else limit)
    )


async def test_users_take_turns_in_a_batch(held: HeldDatabase) -> None:
    reads, read = ReadBatcher(held), BatchedRead(numbers, OWNED, size_column=1)
    tasks = [start(reads, read, "a", 1) for _ in range(100)]
    await asyncio.sleep(0)
    tasks += [start(reads, read, "b", 2), start(reads, read, "c", 3)]
    await asyncio.sleep(0)
    held.released.set()
    rows = await asyncio.gather(*tasks)
    assert [len(row) for row in rows] == [1] * 100 + [2, 3]
    shared = next(owners for owners in held.owners if "b" in owners)
    assert held.owners.index(shared) <= 1 + read_batching.MAX_IN_FLIGHT
    assert "c" in shared


async def test_reads_of_one_user_in_a_statement_ask_for_a_bounded_number_of_rows(
    held: HeldDatabase,
) -> None:
    reads, read = ReadBatcher(held), BatchedRead(numbers, OWNED, size_column=1)
    limit = read_batching.MAX_ROWS_PER_USER // 2
    tasks = [start(reads, read, "a", 1, limit) for _ in range(60)]
    tasks += [start(reads, read, "b", 1, 2 * limit + 1) for _ in range(60)]
    tasks += [start(reads, read, "c", 1) for _ in range(60)]
    await asyncio.sleep(0)
    held.released.set()
    await asyncio.gather(*tasks)
    assert max(owners.count("a") for owners in held.owners) == 2
    assert max(owners.count("b") for owners in held.owners) == 1
    assert max(owners.count("c") for owners in held.owners) > 2
    shared = next(n for n, owners in enumerate(held.owners) if "c" in owners)
    assert shared <= 1 + read_batching.MAX_IN_FLIGHT


@pytest.mark.parametrize("n", [LARGE_N, MANY_BYTES_N])
async def test_large_reads_share_no_statement_with_other_users(held: HeldDatabase, n: int) -> None:
    held.released.set()
    reads, read = ReadBatcher(held), BatchedRead(numbers, OWNED, size_column=1)
    await asyncio.gather(*(start(reads, read, "a", n) for _ in range(40)))
    assert "a" in held.large_reads
    held.owners.clear()
    held.max_in_flight.clear()
    tasks = []
    for _ in range(40):
        tasks += [start(reads, read, "a", n), start(reads, read, "b", 1)]
    rows = await asyncio.gather(*tasks)
    assert [len(row) for row in rows] == [n, 1] * 40
    assert sum(owners == ["a"] for owners in held.owners) == 40
    assert not any("a" in owners for owners in held.owners if len(owners) > 1)
    assert held.max_in_flight["a"] == 1


async def test_reads_that_wait_behind_a_large_one_leave_the_batch(held: HeldDatabase) -> None:
    reads, read = ReadBatcher(held), BatchedRead(numbers, OWNED, size_column=1)
    first = start(reads, read, "a", LARGE_N)
    await asyncio.sleep(0)
    queued = [start(reads, read, "a", LARGE_N) for _ in range(5)]
    await asyncio.sleep(0)
    held.large_reads.add("a")
    held.released.set()
    await asyncio.gather(first, *queued)
    assert held.owners == [["a"]] * 6


async def test_user_whose_reads_are_small_again_shares_statements(held: HeldDatabase) -> None:
    held.released.set()
    reads, read = ReadBatcher(held), BatchedRead(numbers, OWNED, size_column=1)
    await start(reads, read, "a", LARGE_N)
    assert "a" in held.large_reads
    await start(reads, read, "a", LARGE_N)
    assert "a" in held.large_reads
    await start(reads, read, "a", 1)
    assert "a" not in held.large_reads


def test_recent_keys_are_bounded() -> None:
    keys = RecentKeys(2)
    for key in "abac":
        keys.add(key)
    assert [key in keys for key in "abc"] == [True, False, True]
    keys.discard("b")
    keys.discard("c")
    assert "c" not in keys
