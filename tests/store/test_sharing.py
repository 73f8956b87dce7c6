"""Reads that share a statement."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from sqlalchemy import Integer, bindparam, literal_column, select

from service.store.db import read_batching
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.db.hot_pool import Record, Statement
from service.store.db.read_batching import BatchedRead, ReadBatcher

_read = select((bindparam("n", type_=Integer) * literal_column("2")).label("twice"))


class Counting(Database):
    """A database that keeps the texts of the hot statements."""

    texts: list[str]

    async def fetch_once(self, statement: Statement, *args: object) -> list[Record]:
        self.texts.append(statement.text)
        return await super().fetch_once(statement, *args)


@pytest.fixture
async def database(database_url: str) -> AsyncGenerator[Counting]:
    database = Counting(parse(database_url))
    database.texts = []
    yield database
    await database.close()


async def ask(reads: ReadBatcher, read: BatchedRead, numbers: range) -> list[int]:
    deadline = asyncio.get_running_loop().time() + 30
    answers = await asyncio.gather(*(reads.fetch(read, deadline, n=n) for n in numbers))
    return [row[0] for [row] in answers]


async def test_reads_at_once_share_statements_and_each_has_its_own_answer(
    database: Counting,
) -> None:
    read = BatchedRead(_read)
    reads = ReadBatcher(database)
    assert await ask(reads, read, range(200)) == [2 * n for n in range(200)]
    assert len(database.texts) < 200 / read_batching.WIDTH + 10
    database.texts.clear()
    for n in range(5):
        assert await ask(reads, read, range(n, n + 1)) == [2 * n]
    assert database.texts[-1] == read.alone.text, "one that comes alone leaves alone"


async def test_what_the_database_refuses_to_share_runs_alone_from_then_on(
    database: Counting,
) -> None:
    read = BatchedRead(_read)
    # PostgreSQL's own "feature not supported", which is what Citus answers to the shared statement.
    read.together = Statement.from_text("SELECT 1 UNION SELECT 2 FOR UPDATE")
    reads = ReadBatcher(database)
    assert await ask(reads, read, range(40)) == [2 * n for n in range(40)]
    assert read.together.text in database.texts
    database.texts.clear()
    assert await ask(reads, read, range(40)) == [2 * n for n in range(40)]
    assert set(database.texts) == {read.alone.text}


async def test_a_shared_statement_that_fails_fails_nobody_who_succeeds_alone(
    database: Counting,
) -> None:
    read = BatchedRead(
        select((literal_column("10") / bindparam("n", type_=Integer)).label("tenth"))
    )
    reads = ReadBatcher(database)
    deadline = asyncio.get_running_loop().time() + 30
    answers = await asyncio.gather(
        *(reads.fetch(read, deadline, n=n) for n in (1, 2, 0, 5, 10)), return_exceptions=True
    )
    assert isinstance(answers[2], Exception)
    assert [
        row[0] for answer in answers if not isinstance(answer, BaseException) for row in answer
    ] == [10, 5, 2, 1]
