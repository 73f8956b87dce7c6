"""ReadBatcher: concurrent reads share statements, and each gets its own rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from sqlalchemy import Integer, Select, literal_column, select

from service.server import Server
from service.store import context, message_pages
from service.store.db import read_batching
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.db.hot_pool import Record, Statement
from service.store.db.read_batching import BatchedRead, Parameters, ReadBatcher
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

    async def fetch_once(self, statement: Statement, *args: object) -> list[Record]:
        self.texts.append(statement.text)
        return await super().fetch_once(statement, *args)


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
    "a page of a watch": message_pages._AFTER_SEQ_IN_SAME_SESSION,
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
                    "limit": limit,
                }
                for seq in (0, 7, message_pages.MAX_SEQ)
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
