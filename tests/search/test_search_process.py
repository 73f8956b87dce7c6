"""The search process: who is served in which order, and what happens to a text that ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import structlog

from service.search.embeddings import OfflineEmbeddings
from service.search.index_changes import ChangeBuilder
from service.search.types import (
    InputRejected,
    PointKind,
    SearchUnavailable,
    TextBlocked,
)
from service.search.worker import framing, parent, restarts
from service.search.worker.parent import SearchProcess
from service.search.worker.turns import MAX_QUERIES_IN_ROW, Turns
from service.store.outbox.index_source import Item, Range
from tests.search.faulty_model import CRASH, HANG, SLOW, FaultyModel

DIMENSIONS = 256


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FaultyModel:
    """Return the model of the search processes of this test."""
    return FaultyModel(monkeypatch, tmp_path)


@pytest.fixture
async def process(model: FaultyModel) -> AsyncGenerator[SearchProcess]:
    """Yield a search process that is not started yet."""
    process = SearchProcess()
    yield process
    await process.close()


@pytest.fixture
def embeddings(process: SearchProcess) -> OfflineEmbeddings:
    """Return the embeddings of the search process."""
    return OfflineEmbeddings(process)


def read_oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_process_runs_at_a_lower_priority_and_is_the_first_victim_of_the_oom_killer(
    process: SearchProcess, embeddings: OfflineEmbeddings
) -> None:
    await embeddings.embed_query("some query")
    assert process.pid is not None
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(
        os.getpriority(os.PRIO_PROCESS, 0) + 10, 19
    )
    assert read_oom_score(process.pid) > read_oom_score(os.getpid())


async def test_abandoned_queries_are_not_computed(
    embeddings: OfflineEmbeddings, model: FaultyModel
) -> None:
    await embeddings.embed_query("first query")
    running = asyncio.create_task(embeddings.embed_query(f"running {SLOW}"))
    await asyncio.sleep(0)
    abandoned = [
        asyncio.create_task(embeddings.embed_query(f"abandoned query {n}")) for n in range(20)
    ]
    await asyncio.sleep(0)
    for task in abandoned:
        task.cancel()
    last = await embeddings.embed_query("last query")
    await running
    assert len(last) == 4 * DIMENSIONS
    assert model.computed("abandoned") == []
    assert model.computed("last query") == ["last query"]


@pytest.mark.faults
async def test_query_that_is_abandoned_while_it_is_computed_keeps_its_turn(
    process: SearchProcess, embeddings: OfflineEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "REPLY_TIMEOUT_S", 5.0)
    await embeddings.embed_query("first query")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await embeddings.embed_query(f"it {HANG}")
    # The next request is not sent to the hanging process, so that it is not taken for the cause.
    pid = process.pid
    await embeddings.embed_query("second query")
    assert process.pid != pid
    assert process.restart_count == 1


@pytest.mark.faults
@pytest.mark.parametrize("mark", [CRASH, HANG])
async def test_query_that_ends_the_process_twice_is_blocked_and_others_are_served(
    process: SearchProcess,
    embeddings: OfflineEmbeddings,
    model: FaultyModel,
    monkeypatch: pytest.MonkeyPatch,
    mark: str,
) -> None:
    if mark == HANG:
        monkeypatch.setattr(parent, "REPLY_TIMEOUT_S", 5.0)
    await embeddings.embed_query("first query")
    bad = asyncio.create_task(embeddings.embed_query(f"it {mark}"))
    await asyncio.sleep(0)
    others = [asyncio.create_task(embeddings.embed_query(f"other query {n}")) for n in range(5)]
    with pytest.raises(TextBlocked):
        await bad
    assert all(len(vector) == 4 * DIMENSIONS for vector in await asyncio.gather(*others))
    assert len(model.computed(mark)) == 2
    assert process.restart_count == 2
    first_text, *order = model.computed()
    assert first_text == "first query"
    assert order[:4] == [f"it {mark}", "other query 0", "other query 1", "other query 2"], (
        "the others precede the second attempt"
    )
    with pytest.raises(TextBlocked):
        await embeddings.embed_query(f"it {mark}")
    assert len(model.computed(mark)) == 2, "it is not computed again"


def test_process_that_computes_on_one_text_for_too_long_ends_itself() -> None:
    program = """
import asyncio
from service.search.worker import child, framing

async def compute(_argument, _blob):
    while True:
        pass

child.MAX_CPU_S = 0.2
frame = framing.Frame([1, "embed", ["text"]], b"")
asyncio.run(child._answer({"embed": compute}, frame))
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert ended.returncode == -signal.SIGPROF


def test_time_limit_of_a_request_ends_with_the_request() -> None:
    program = """
import asyncio, time
from service.search.worker import child, framing

async def compute(_argument, _blob):
    return None, b""

child.MAX_CPU_S = 0.2
frame = framing.Frame([1, "embed", ["text"]], b"")
asyncio.run(child._answer({"embed": compute}, frame))
while time.process_time() < 1.0:
    pass
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert ended.returncode == 0


async def test_innocent_text_that_was_computed_at_a_death_is_computed_again(
    process: SearchProcess, embeddings: OfflineEmbeddings, model: FaultyModel
) -> None:
    await embeddings.embed_query("first query")
    query = asyncio.create_task(embeddings.embed_query(f"an innocent {SLOW}"))
    while not model.computed("innocent"):
        await asyncio.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, 9)
    assert len(await query) == 4 * DIMENSIONS
    # Its success clears it: a second accident long afterwards would not be held against it.
    assert not process._suspects


async def test_batch_with_a_text_that_ends_the_process_is_halved_until_the_text_is_alone(
    process: SearchProcess,
    embeddings: OfflineEmbeddings,
    model: FaultyModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restarts, "BASE_S", 0.001)
    count, bad = 32, 21
    texts = [f"text {n}" if n != bad else f"text {CRASH}" for n in range(count)]
    ranges = [Range("user", f"document {n}", 0, 0) for n in range(count)]
    items = [Item(n, 0, "0", text, None) for n, text in enumerate(texts)]
    builder = ChangeBuilder(embeddings, DIMENSIONS)
    changes, rejections = await builder.build(PointKind.CHUNK, ranges, items)
    assert {point.entity_id for point in changes.upserts} == {
        f"document {n}" for n in range(count) if n != bad
    }
    ((entity, rejection),) = rejections.items()
    assert entity == ("user", f"document {bad}")
    assert rejection.is_final
    assert "search process" in rejection.reason
    assert len(model.computed(CRASH)) == process.restart_count == 5 + 2
    # The text is known now, and the next batch with it costs no process.
    _, again = await builder.build(PointKind.CHUNK, ranges, items)
    assert set(again) == {entity}
    assert process.restart_count == 5 + 2


async def test_rerank_that_ends_the_process_twice_leaves_the_order_by_vectors(
    process: SearchProcess, embeddings: OfflineEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "REPLY_TIMEOUT_S", 5.0)
    await embeddings.embed_query("first query")
    real_request = process._request

    async def request(connection: Any, operation: str, *arguments: Any) -> Any:
        if operation == "rerank":
            connection.kill()
        return await real_request(connection, operation, *arguments)

    monkeypatch.setattr(process, "_request", request)
    assert await embeddings.rerank("query", [("title", "text")]) is None
    await embeddings.embed_query("second query")
    assert process.restart_count == 2
    assert await embeddings.rerank("query", [("title", "text")]) is None
    await embeddings.embed_query("third query")
    assert process.restart_count == 2


async def test_process_that_cannot_start_is_not_started_in_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    process = SearchProcess()
    with structlog.testing.capture_logs() as events, pytest.raises(SearchUnavailable):
        await process.call("dimensions")
    delays = [event["delay_s"] for event in events if event["event"].endswith("started again")]
    assert delays == [0.0]
    await process.close()


def test_restarts_of_a_process_that_dies_young_are_delayed_up_to_a_limit() -> None:
    delays = [restarts.delay_s(count) for count in range(10)]
    assert delays[:2] == [0.0, 0.0], "the first death may be an accident"
    assert delays == sorted(delays)
    assert 0 < delays[2] < delays[-1] == restarts.CAP_S


async def test_frame_over_the_limit_is_neither_sent_nor_received(
    embeddings: OfflineEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await embeddings.embed_query("first query")
    with pytest.raises(ValueError, match="larger than"):
        framing.decode_lengths((framing.MAX_FRAME_BYTES + 1).to_bytes(4, "little") + bytes(4))
    monkeypatch.setattr(framing, "MAX_FRAME_BYTES", 1000)
    with pytest.raises(InputRejected):
        await embeddings.embed_query("a long query " * 100)


async def test_long_batches_are_sent_in_parts_of_bounded_size(
    process: SearchProcess, embeddings: OfflineEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    call = process.call

    async def counting_call(operation: str, argument: Any, **options: Any) -> Any:
        sent.append(sum(map(len, argument)))
        return await call(operation, argument, **options)

    monkeypatch.setattr(process, "call", counting_call)
    texts = ["x y" * 2_700 for _ in range(64)]
    vectors = await embeddings.embed(texts)
    assert len(vectors) == 64 * 4 * DIMENSIONS
    assert len(sent) >= 4
    assert max(sent) <= 131_072


@pytest.fixture
def turns() -> Turns:
    """Return turns that no request has yet."""
    return Turns()


async def test_queries_precede_indexing_which_gets_its_turn_under_constant_queries(
    turns: Turns,
) -> None:
    order: list[str] = []

    async def request(name: str, *, is_query: bool) -> None:
        await turns.acquire(is_query=is_query)
        order.append(name)
        await asyncio.sleep(0)
        turns.release()

    await turns.acquire(is_query=True)
    tasks = [asyncio.create_task(request(f"indexing {n}", is_query=False)) for n in range(2)]
    tasks += [asyncio.create_task(request(f"query {n}", is_query=True)) for n in range(6)]
    await asyncio.sleep(0)
    turns.release()
    await asyncio.gather(*tasks)
    first = [f"query {n}" for n in range(MAX_QUERIES_IN_ROW)]
    assert order == [*first, "indexing 0", "query 4", "query 5", "indexing 1"]


async def test_turn_of_a_request_that_is_cancelled_passes_to_the_next(turns: Turns) -> None:
    await turns.acquire(is_query=True)
    waiting = [asyncio.create_task(turns.acquire(is_query=True)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # Its task has not run yet when the turn is released.
    turns.release()
    waiting[1].cancel()  # It has just been granted.
    await asyncio.gather(*waiting, return_exceptions=True)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    turns.release()
    await turns.acquire(is_query=False)
