"""PostgreSQL's clock is set back by an hour while rows of the search outbox wait.

A test cannot change the clock of the machine. It moves the times of the rows ahead instead, which
leaves the same rows behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from chathistory.v1 import search_pb2

from service.search import indexer, rebuild
from service.search.service import Search
from service.server import Server
from service.store.outbox.outbox import CLOCK_STEP_S, MAX_DELAY_S, Outbox
from service.store.outbox.reindex_state import ReindexState
from tests.search.library import INDEXED, Library
from tests.search.waits import (
    wait_until,
    wait_until_built,
    wait_until_indexed,
    wait_until_searchable,
)
from tests.support.chat import Chat
from tests.support.cluster import fetch
from tests.support.servers import connected, serving

pytestmark = pytest.mark.case(n=510)

STEP = "interval '1 hour'"
MOVE_ROWS = f"UPDATE search_outbox SET due_at = due_at + {STEP}, owed_at = owed_at + {STEP}"


@pytest.fixture
async def server(database_url: str, tmp_path: Path) -> AsyncGenerator[Server]:
    """Yield a server whose index is built."""
    async with serving(database_url, search="on", data_dir=tmp_path) as server:
        await wait_until_searchable(server)
        await wait_until_built(server)
        yield server


@pytest.fixture
async def library(server: Server) -> AsyncGenerator[Library]:
    """Yield documents and search of a new user."""
    async with connected(server.address) as stub:
        yield Library(await Chat.of_new_user(stub))


def indexer_of(server: Server) -> indexer.Indexer:
    assert isinstance(server.search, Search)
    assert server.search._indexer is not None
    return server.search._indexer


def test_every_ordinary_delay_is_below_the_limit_of_dated_ahead() -> None:
    assert max(indexer.LEASE_S, indexer.RETRY_CAP_S) <= MAX_DELAY_S < CLOCK_STEP_S
    assert rebuild.LEASE_S < CLOCK_STEP_S


async def test_rows_that_a_clock_step_has_dated_ahead_are_indexed(
    server: Server, library: Library, database_url: str
) -> None:
    working = indexer_of(server)
    await working.stop()
    document = await library.create(["Herons are wading birds."], title="birds")
    session_id = await library.chat.start("storks nest on chimneys")
    await fetch(database_url, MOVE_ROWS)
    backlog = await Outbox(server.database).backlog()
    assert (backlog.pending, backlog.dated_ahead) == (2, 2)
    assert backlog.oldest_age_s == 0
    assert backlog.next_due_s is not None
    assert backlog.next_due_s <= 0, "they count as due"
    working.start()
    await wait_until_indexed(server)
    assert (await library.get(document.id)).status == INDEXED
    assert working.stats.lag_s < 3600
    # A row that changes keeps the time at which it is due.
    await working.stop()
    await library.chat.append(session_id, "and clap their beaks")
    await fetch(database_url, MOVE_ROWS)
    await library.chat.append(session_id, "in spring")
    working.start()
    await wait_until_indexed(server)


async def test_dead_letter_and_ordinary_lease_and_retry_stay_as_they_are(
    server: Server, library: Library, database_url: str
) -> None:
    await indexer_of(server).stop()
    outbox = Outbox(server.database)
    for n in range(3):
        await library.create([f"text {n}"])
    leased = await outbox.claim("6f2c1f3e-3d0c-4a53-9d3c-6f0b8d3c2f10", MAX_DELAY_S, 1)
    retried = await outbox.claim("6f2c1f3e-3d0c-4a53-9d3c-6f0b8d3c2f11", MAX_DELAY_S, 1)
    await outbox.release("6f2c1f3e-3d0c-4a53-9d3c-6f0b8d3c2f11", retried, indexer.RETRY_CAP_S)
    dead = await outbox.claim("6f2c1f3e-3d0c-4a53-9d3c-6f0b8d3c2f12", MAX_DELAY_S, 1)
    await outbox.release("6f2c1f3e-3d0c-4a53-9d3c-6f0b8d3c2f12", dead, None)
    assert len(leased) == len(retried) == len(dead) == 1
    rows = "SELECT entity_id, due_at FROM search_outbox ORDER BY entity_id"
    before = await fetch(database_url, rows)
    assert (await outbox.backlog()).dated_ahead == 0
    assert await outbox.date_again() == 0
    assert await fetch(database_url, rows) == before


async def test_lease_that_a_clock_step_has_dated_ahead_is_kept_for_its_full_length(
    server: Server, library: Library, database_url: str
) -> None:
    """Its indexer may still write. Another one must not, or an older text could win."""
    await indexer_of(server).stop()
    outbox = Outbox(server.database)
    await library.create(["text"])
    lease_id = "6f2c1f3e-3d0c-4a53-9d3c-6f0b8d3c2f13"
    (row,) = await outbox.claim(lease_id, MAX_DELAY_S, 10)
    await fetch(database_url, MOVE_ROWS)
    assert await outbox.date_again() == 1
    assert await outbox.claim("6f2c1f3e-3d0c-4a53-9d3c-6f0b8d3c2f14", MAX_DELAY_S, 10) == []
    backlog = await outbox.backlog()
    assert backlog.next_due_s is not None
    assert 0 < backlog.next_due_s <= MAX_DELAY_S
    assert await outbox.finish(lease_id, [row]) == {row[:3]}


async def test_reindex_ends_after_a_clock_step(
    server: Server, library: Library, database_url: str
) -> None:
    document = await library.create(["Herons are wading birds."], title="birds")
    await wait_until_indexed(server)
    working = indexer_of(server)
    await working.stop()
    state = ReindexState(server.database, working._reindex_state._alias)
    # The lease of a process that died before the step.
    assert await state.acquire("6f2c1f3e-3d0c-4a53-9d3c-6f0b8d3c2f15", 3600) is not None
    calls = library.stub.RebuildSearchIndex(search_pb2.RebuildSearchIndexRequest())

    async def follow() -> None:
        async for _ in calls:
            pass

    task = asyncio.create_task(follow())

    async def is_enqueued() -> bool:
        return bool(await fetch(database_url, "SELECT FROM search_outbox"))

    await wait_until(is_enqueued, "the rebuild has enqueued the document")
    await fetch(database_url, MOVE_ROWS)
    working.start()
    await task
    assert await fetch(database_url, "SELECT FROM search_outbox") == []
    hits = await library.search("which bird wades")
    assert [hit.document.id for hit in hits] == [document.id]
