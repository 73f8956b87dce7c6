"""The scenario of documents and search.

It measures the embedded default, where Qdrant's local mode and the offline embeddings run in a
process of their own:

- appends with message indexing on, while the outbox is drained, compared with search off;
- documents and chunks indexed per second;
- SearchDocuments with an increasing number of stored chunks;
- GetContext and health checks while 1,000 chunks are indexed, compared with GetContext at rest;
- recall on the labelled questions of tests/search/texts: short sections, and long similar ones.
"""

from __future__ import annotations

import asyncio
import csv
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import grpc
import psutil
from chathistory.v1 import document_pb2, user_pb2
from grpc_health.v1 import health_pb2

from benchmarks import workload
from benchmarks.bench import SESSIONS, TYPICAL_IN_FLIGHT, Bench
from benchmarks.comparison import Comparison, Figures, Subject, measure_once
from benchmarks.environment import ROOT, Environment, Server
from benchmarks.load_generator import Load

if TYPE_CHECKING:
    from pathlib import Path

    from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceAsyncStub as Stub

TEXTS = ROOT / "tests" / "search" / "texts"
SEARCH_ON = {"CHAT_HISTORY_SEARCH": "on"}
_SENTENCE = (
    "The quick brown fox jumps over the lazy dog, and no fox knows why it does such a thing on a "
    "rainy day. "
)
_CHUNK = _SENTENCE * 8
"""About 800 characters, a usual size of chunks."""
_CHUNKS_PER_DOCUMENT = 20
_READERS = 4
"""Concurrent calls of GetContext while chunks are indexed."""
_INDEXED_WHILE_READING = 1_000
"""Chunks that are indexed while contexts are read."""
_DEFAULT_HITS = 10
_INDEX_TIMEOUT_S = 300.0
_DOCUMENTS_DATABASE = "search-documents"

_PENDING_MESSAGES_SQL = """
SELECT coalesce(sum(s.last_seq - least(o.since, o.taken_since) + 1), 0)::bigint
FROM search_outbox AS o JOIN chat_sessions AS s ON s.user_id = o.user_id AND s.id = o.entity_id
"""


async def search(bench: Bench) -> dict[str, Any]:
    """Measure appends, documents and recall."""
    return {
        "appends": await _appends(bench),
        "documents": await _documents(bench),
        "recall": {
            "short": await _recall(bench.environment, TEXTS),
            "long": await _recall(bench.environment, TEXTS / "long"),
        },
    }


async def _appends(bench: Bench) -> dict[str, Any]:
    """Append with message indexing on and off, in turn, each time with an empty outbox."""
    environment, plan = bench.environment, bench.plan
    load = bench.write_load(TYPICAL_IN_FLIGHT)
    bench.progress.expect(2 * plan.rounds)
    keys = {
        name: await bench.new_sessions_in(f"search-{name}", SESSIONS)
        for name in ("indexed", "plain")
    }
    result = Comparison(load, {name: [] for name in keys})
    child_us: list[float] = []
    indexed_shares: list[float] = []
    catch_up_s: list[float] = []
    async with (
        environment.service("search-indexed", "indexed", **SEARCH_ON) as indexed,
        environment.service("search-plain", "plain") as plain,
    ):
        await _wait_for_search(indexed)
        subjects = [
            Subject(name, server, "AppendMessages", bench.append_bodies(keys[name], load))
            for name, server in (("indexed", indexed), ("plain", plain))
        ]
        for _ in range(plan.rounds):
            for subject in subjects:
                child_before_s = _child_cpu_s(subject.server)
                figures = await measure_once(environment, subject, load, environment.folder)
                result.rounds[subject.name].append(figures)
                if subject.name == "indexed":
                    child_us.append(
                        (_child_cpu_s(indexed) - child_before_s) / figures.answered * 1e6
                    )
                    indexed_shares.append(
                        1
                        - await _pending_messages(environment, "search-indexed") / figures.answered
                    )
                    catch_up_s.append(await _wait_until_indexed(environment, "search-indexed"))
                bench.progress.advance()
    rows = await bench.check_rows("search-indexed", result.answered("indexed"))
    return {
        "run": result.as_dict(),
        "rows": rows,
        "child_us_per_append": round(median(child_us), 1),
        "indexed_during_load": round(median(indexed_shares), 3),
        "seconds_to_catch_up": round(median(catch_up_s), 2),
    }


def _child_cpu_s(server: Server) -> float:
    """Return the CPU time that a server's child processes have used so far."""
    times = [child.cpu_times() for child in psutil.Process(server.pid).children()]
    return float(sum(child.user + child.system for child in times))


async def _documents(bench: Bench) -> dict[str, Any]:
    """Index documents, read contexts at the same time, and search."""
    keys = await bench.new_sessions_in(_DOCUMENTS_DATABASE, 50, workload.SESSION_MESSAGES)
    bench.progress.expect(bench.plan.rounds + len(bench.plan.chunks))
    async with (
        bench.environment.service(_DOCUMENTS_DATABASE, "documents", **SEARCH_ON) as server,
        server.stub() as stub,
    ):
        await _wait_for_search(server)
        await _wait_until_indexed(bench.environment, _DOCUMENTS_DATABASE)
        contexts = Subject(
            "documents", server, "GetContext", workload.context_bodies(keys), cycle=True
        )
        return {
            **await _read_while_indexing(bench, contexts, stub),
            **await _search_by_size(bench, stub),
            "memory": {
                "server": server.rss_bytes,
                "child": sum(
                    child.memory_info().rss for child in psutil.Process(server.pid).children()
                ),
            },
        }


async def _read_while_indexing(bench: Bench, contexts: Subject, stub: Stub) -> dict[str, Any]:
    """Measure GetContext at rest, and together with health checks while chunks are indexed."""
    environment = bench.environment
    load = Load(_READERS, bench.plan.read_seconds, 0.0)
    quiet: list[Figures] = []
    busy: list[Figures] = []
    health_s: list[float] = []
    for _ in range(bench.plan.rounds):
        user_id = await _create_user(stub)
        quiet.append(await measure_once(environment, contexts, load, environment.folder))
        reading = asyncio.create_task(measure_once(environment, contexts, load, environment.folder))
        health_check = asyncio.create_task(_slowest_check(contexts.server, reading))
        await _create_documents(stub, user_id, 0, _INDEXED_WHILE_READING)
        busy.append(await reading)
        health_s.append(await health_check)
        await _wait_until_indexed(environment, _DOCUMENTS_DATABASE)
        bench.progress.advance()
    ratios = [ours.p99_us / theirs.p99_us for ours, theirs in zip(busy, quiet, strict=True)]
    return {
        "other_users_chunks": _INDEXED_WHILE_READING * bench.plan.rounds,
        "context_p99_us": {
            "quiet": median(figures.p99_us for figures in quiet),
            "indexing": median(figures.p99_us for figures in busy),
        },
        "context_p99_ratio": round(median(ratios), 2),
        "health_worst_ms": round(max(health_s) * 1e3, 1),
    }


async def _search_by_size(bench: Bench, stub: Stub) -> dict[str, Any]:
    """Search the documents of one user while their number grows."""
    user_id = await _create_user(stub)
    stored, documents, seconds = 0, 0, 0.0
    p50_ms: dict[str, float] = {}
    for size in bench.plan.chunks:
        started = time.perf_counter()
        documents += await _create_documents(stub, user_id, stored, size)
        await _wait_until_indexed(bench.environment, _DOCUMENTS_DATABASE)
        seconds += time.perf_counter() - started
        stored = size
        p50_ms[str(size)] = round(await _median_search_ms(stub, user_id, bench.plan.searches), 1)
        bench.progress.advance()
    return {
        "documents_per_second": round(documents / seconds, 1),
        "chunks_per_second": round(stored / seconds),
        "search_p50_ms": p50_ms,
    }


async def _recall(environment: Environment, folder: Path) -> dict[str, float]:
    """Return how often the right section for a question is first, and among the first five."""
    database = f"search-recall-{folder.name}"
    await environment.new_database(database)
    questions, texts = _read_labelled(folder)
    async with (
        environment.service(database, database, **SEARCH_ON) as server,
        server.stub() as stub,
    ):
        await _wait_for_search(server)
        user_id = await _create_user(stub)
        for name, sections in texts.items():
            await stub.CreateDocument(_document_request(user_id, sections, name))
        await _wait_until_indexed(environment, database)
        ranks: list[int | None] = []
        for question in questions:
            request = document_pb2.SearchDocumentsRequest(
                user_id=user_id, query=question["question"], limit=5
            )
            hits = (await stub.SearchDocuments(request)).hits
            is_right = [
                hit.document.title == question["file"]
                and hit.text.startswith(f"## {question['heading']}\n")
                for hit in hits
            ]
            ranks.append(is_right.index(True) + 1 if True in is_right else None)
    return {
        "questions": len(questions),
        "sections": sum(map(len, texts.values())),
        "first": round(ranks.count(1) / len(ranks), 3),
        "recall_at_5": round(1 - ranks.count(None) / len(ranks), 3),
    }


def _read_labelled(folder: Path) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """Return a folder's questions, and the sections of its texts by file name."""
    with (folder / "questions.tsv").open(newline="") as file:
        questions = list(csv.DictReader(file, delimiter="\t"))
    return questions, {
        path.name: ["## " + part.strip() for part in path.read_text().split("\n## ")[1:]]
        for path in sorted(folder.glob("*.md"))
    }


async def _create_user(stub: Stub) -> str:
    return (
        await stub.CreateUser(user_pb2.CreateUserRequest(user=user_pb2.User(name="reader")))
    ).user.id


def _document_request(
    user_id: str, texts: Sequence[str], title: str = ""
) -> document_pb2.CreateDocumentRequest:
    return document_pb2.CreateDocumentRequest(
        user_id=user_id,
        document=document_pb2.Document(title=title),
        chunks=[document_pb2.DocumentChunk(text=text) for text in texts],
    )


async def _create_documents(stub: Stub, user_id: str, first: int, end: int) -> int:
    """Store documents with the chunks from `first` up to `end` and return their number."""
    starts = range(first, end, _CHUNKS_PER_DOCUMENT)
    for start in starts:
        await stub.CreateDocument(
            _document_request(
                user_id, [f"{start + index} {_CHUNK}" for index in range(_CHUNKS_PER_DOCUMENT)]
            )
        )
    return len(starts)


async def _median_search_ms(stub: Stub, user_id: str, count: int) -> float:
    """Return the median duration of a search in milliseconds."""
    durations_s: list[float] = []
    for number in range(count):
        request = document_pb2.SearchDocumentsRequest(
            user_id=user_id, query=f"{number} what does the animal do when it rains"
        )
        started = time.perf_counter()
        reply = await stub.SearchDocuments(request)
        durations_s.append(time.perf_counter() - started)
        assert len(reply.hits) == _DEFAULT_HITS  # noqa: S101 - the duration of a failed search would mean nothing
    return median(durations_s) * 1e3


async def _is_serving(channel: grpc.aio.Channel, name: str) -> bool:
    call: Any = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    reply = await call(health_pb2.HealthCheckRequest(service=name))
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def _wait_for_search(server: Server) -> None:
    async with asyncio.timeout(30), grpc.aio.insecure_channel(server.address) as channel:
        while not await _is_serving(channel, "search"):  # noqa: ASYNC110 - in another process
            await asyncio.sleep(0.1)


async def _slowest_check(server: Server, until: asyncio.Task[Any]) -> float:
    """Check readiness until a task is done and return the longest check in seconds."""
    longest_s = 0.0
    async with grpc.aio.insecure_channel(server.address) as channel:
        while not until.done():
            started = time.perf_counter()
            await _is_serving(channel, "")
            longest_s = max(longest_s, time.perf_counter() - started)
            await asyncio.sleep(0.02)
    return longest_s


async def _pending_messages(environment: Environment, database: str) -> int:
    async with environment.connect(database) as connection:
        return int(await connection.fetchval(_PENDING_MESSAGES_SQL))


async def _wait_until_indexed(environment: Environment, database: str) -> float:
    """Wait until the outbox is empty and return the seconds that it took."""
    started = time.perf_counter()
    async with asyncio.timeout(_INDEX_TIMEOUT_S), environment.connect(database) as connection:
        while await connection.fetchval("SELECT count(*) FROM search_outbox"):  # noqa: ASYNC110 - in another process
            await asyncio.sleep(0.05)
    return time.perf_counter() - started
