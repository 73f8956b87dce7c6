"""One user's searches and texts do not take search from the others: embedded index and model."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc
import pytest
from chathistory.v1 import document_pb2
from grpc import aio

from service.search.service import Search
from service.search.worker import restarts
from service.server import Server
from tests.search.faulty_model import CRASH, SLOW, FaultyModel
from tests.search.library import INDEXED, SEMANTIC, Library
from tests.search.waits import wait_until, wait_until_indexed, wait_until_searchable
from tests.support.failures import assert_field_violations, read_failure
from tests.support.servers import serving

FAILED = document_pb2.DOCUMENT_STATUS_FAILED


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FaultyModel:
    """Return the model of the search processes of this test."""
    return FaultyModel(monkeypatch, tmp_path)


@pytest.fixture
async def server(database_url: str, tmp_path: Path, model: FaultyModel) -> AsyncGenerator[Server]:
    """Yield a server whose search process uses the model."""
    settings = {"search": "on", "data_dir": tmp_path / "data", "search_timeout": 20.0}
    async with serving(database_url, **settings) as server:
        await wait_until_searchable(server)
        yield server


async def outcome(library: Library, query: str) -> str:
    """Search, and return OK or the reason of the failure."""
    try:
        await library.search(query)
    except aio.AioRpcError as error:
        failure = read_failure(error)
        assert failure.code is not grpc.StatusCode.RESOURCE_EXHAUSTED or failure.retry_after
        return failure.reason
    return "OK"


@pytest.mark.timeout(180)
async def test_burst_of_searches_is_rejected_and_others_have_their_turn(
    server: Server, library: Library, others: Library, model: FaultyModel
) -> None:
    await library.create(["some text"])
    await others.create(["another text"])
    await wait_until_indexed(server)
    changes: list[bool] = []
    server.search.on_change = lambda: changes.append(server.search.is_healthy)
    flood = f"flood {SLOW} " + "word " * 1_500
    flooding = [asyncio.create_task(outcome(library, flood)) for _ in range(500)]
    while len(model.computed("flood")) < 3:
        await asyncio.sleep(0.01)
    preceding_counts = []
    for n in range(5):
        count = len(model.computed("flood"))
        assert await outcome(others, f"question {n}") == "OK"
        log = model.computed()
        preceding = log[: log.index(f"question {n}")]
        preceding_counts.append(sum(text.startswith("flood") for text in preceding) - count)
    outcomes = await asyncio.gather(*flooding)
    assert set(outcomes) == {"OK", "OVERLOADED"}
    assert outcomes.count("OK") >= 10, "the server goes on answering"
    assert outcomes.count("OVERLOADED") > 300
    assert max(preceding_counts) < 12, "and not the hundreds that were sent before"
    assert len(model.computed("flood")) == outcomes.count("OK"), "no rejected one was computed"
    assert changes == []
    assert server.search.is_healthy
    assert server.search.query_stats.rejected > 0
    assert server.search.query_stats.waiting == 0


async def test_searches_whose_callers_are_gone_are_not_computed(
    server: Server, library: Library, others: Library, model: FaultyModel
) -> None:
    await library.create(["some text"])
    await wait_until_indexed(server)
    running = asyncio.create_task(outcome(library, f"running {SLOW}"))
    abandoned = [asyncio.create_task(outcome(library, f"abandoned {SLOW} {n}")) for n in range(16)]
    while not model.computed("running"):
        await asyncio.sleep(0.001)
    for task in abandoned:
        task.cancel()
    await asyncio.gather(*abandoned, return_exceptions=True)

    async def is_queue_empty() -> bool:
        return server.search.query_stats.waiting == 0

    await wait_until(is_queue_empty, "the abandoned queries have left the queue")
    computed_count = len(model.computed("abandoned"))
    assert computed_count < 16
    assert await outcome(others, "last question") == "OK"
    assert await running == "OK"
    assert len(model.computed("abandoned")) <= computed_count + 2


@pytest.mark.faults
@pytest.mark.timeout(180)
async def test_text_that_ends_the_search_process_is_blocked_and_the_rest_is_indexed(
    server: Server,
    library: Library,
    others: Library,
    model: FaultyModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restarts, "BASE_S", 0.001)
    bad = await library.create([f"text {n}" if n != 70 else f"a text {CRASH}" for n in range(100)])
    good = await others.create(["nothing is wrong with this one"])
    session = await library.chat.start("before the crash")
    for text in (f"a message {CRASH}", "after the crash"):
        await library.chat.append(session, text)

    outcomes: Counter[str] = Counter()

    async def is_blocked() -> bool:
        outcomes[await outcome(others, "wrong with this")] += 1
        return (await library.get(bad.id)).status == FAILED

    await wait_until(is_blocked, "the document is a dead letter")
    assert set(outcomes) == {"OK"}, "another user searches while the process is started again"
    await wait_until_indexed(server)
    assert "ended the search process" in (await library.get(bad.id)).status_detail
    assert (await others.get(good.id)).status == INDEXED
    hits = await library.search("text 99", document_ids=[bad.id], limit=100)
    assert {hit.chunk_index for hit in hits} == set(range(100)) - {70}
    messages = await library.search_messages("a message", SEMANTIC)
    assert {hit.message.content for hit in messages} == {"before the crash", "after the crash"}
    search = server.search
    assert isinstance(search, Search)
    crash_count = len(model.computed(CRASH))
    assert search.query_stats.process_restarts == crash_count

    async def has_two_dead_letters() -> bool:
        return (search.stats.failed, search.stats.pending) == (2, 0)

    await wait_until(has_two_dead_letters, "document and session are dead letters")
    # A search with such a text fails for its caller alone, and is not tried again.
    for _ in range(2):
        await assert_field_violations(others.search(f"a question {CRASH}"), "query")
    assert await outcome(library, "text 99") == "OK"
    assert len(model.computed(CRASH)) == crash_count + 2
    assert search.is_healthy
