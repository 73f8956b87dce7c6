"""Documents and search, in the embedded default: Qdrant's local mode and the offline embeddings, in a process of their own.

- appends with message indexing on, while the outbox is drained, beside appends with search off;
- documents and chunks indexed a second;
- SearchDocuments with more and more chunks stored;
- GetContext and health while 1,000 chunks are indexed, beside GetContext in quiet;
- how the offline search answers the labelled questions of tests/search/texts: on short sections, and on long ones that are alike.
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
from benchmarks.comparison import Comparison, Figures, Subject, measure_once
from benchmarks.environment import ROOT, Environment, Server
from benchmarks.load_generator import Load

if TYPE_CHECKING:
    from pathlib import Path

    from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceAsyncStub as Stub

    from benchmarks.scenarios import Bench

TEXTS = ROOT / "tests" / "search" / "texts"
ON = {"CHAT_HISTORY_SEARCH": "on"}
_SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody knows why it does such a thing on a rainy day. "
_CHUNK = _SENTENCE * 8
"""About 800 characters, as chunkers cut them."""
_CHUNKS = 20
"""A document."""
_SESSIONS = 200
_IN_FLIGHT = 64
_READERS = 4
_HITS = 10
_DRAIN_SECONDS = 300

_ENQUEUE = """
SELECT coalesce(sum(s.last_seq - least(o.since, o.taken_since) + 1), 0)::bigint
FROM search_outbox AS o JOIN chat_sessions AS s ON s.user_id = o.user_id AND s.id = o.entity_id
"""


async def search(bench: Bench) -> dict[str, Any]:
    """Take all figures."""
    return {
        "appends": await _appends(bench),
        "documents": await _documents(bench),
        "recall": {
            "short": await _recall(bench.environment, TEXTS),
            "long": await _recall(bench.environment, TEXTS / "long"),
        },
    }


async def _appends(bench: Bench) -> dict[str, Any]:
    """Append with message indexing on and off, in turn; the outbox is empty before each."""
    environment, plan = bench.environment, bench.plan
    load = bench.write_load(_IN_FLIGHT)
    bench.progress.expect(2 * plan.rounds)
    keys = {
        name: await bench.new_sessions_in(f"search-{name}", _SESSIONS)
        for name in ("indexed", "plain")
    }
    result = Comparison(load, {name: [] for name in keys})
    child_us: list[float] = []
    shares: list[float] = []
    drained: list[float] = []
    async with (
        environment.service("search-indexed", "indexed", **ON) as indexed,
        environment.service("search-plain", "plain") as plain,
    ):
        await _search_ready(indexed)
        subjects = [
            Subject(name, server, "AppendMessages", bench.append_bodies(keys[name], load))
            for name, server in (("indexed", indexed), ("plain", plain))
        ]
        for _ in range(plan.rounds):
            for subject in subjects:
                before = _child_seconds(subject.server)
                figures = await measure_once(environment, subject, load, environment.folder)
                result.rounds[subject.name].append(figures)
                if subject.name == "indexed":
                    child_us.append((_child_seconds(indexed) - before) / figures.answered * 1e6)
                    shares.append(
                        1
                        - await _pending_messages(environment, "search-indexed") / figures.answered
                    )
                    drained.append(await _wait_until_indexed(environment, "search-indexed"))
                bench.progress.advance()
    rows = await bench.check_rows("search-indexed", result.answered("indexed"))
    return {
        "run": result.as_dict(),
        "rows": rows,
        "child_us_per_append": round(median(child_us), 1),
        "indexed_meanwhile": round(median(shares), 3),
        "seconds_to_catch_up": round(median(drained), 2),
    }


def _child_seconds(server: Server) -> float:
    """Return the processor time of a server's child process so far."""
    times = [child.cpu_times() for child in psutil.Process(server.pid).children()]
    return float(sum(each.user + each.system for each in times))


async def _documents(bench: Bench) -> dict[str, Any]:
    """Index documents, read contexts meanwhile, and search."""
    environment, plan = bench.environment, bench.plan
    keys = await bench.new_sessions_in("search-documents", 50, workload.SESSION_MESSAGES)
    quiet: list[Figures] = []
    busy: list[Figures] = []
    health: list[float] = []
    sizes = plan.chunks
    p50_ms: dict[str, float] = {}
    bench.progress.expect(plan.rounds + len(sizes))
    async with (
        environment.service("search-documents", "documents", **ON) as server,
        server.stub() as stub,
    ):
        await _search_ready(server)
        await _wait_until_indexed(environment, "search-documents")
        users = [await _user(stub) for _ in range(plan.rounds + 1)]
        contexts = Subject(
            "documents", server, "GetContext", workload.context_bodies(keys), cycle=True
        )
        load = Load(_READERS, plan.read_seconds, 0.0)
        for user_id in users[1:]:
            quiet.append(await measure_once(environment, contexts, load, environment.folder))
            reading = asyncio.create_task(
                measure_once(environment, contexts, load, environment.folder)
            )
            asked = asyncio.create_task(_health(server, reading))
            await _create(stub, user_id, 0, 1_000)
            busy.append(await reading)
            health.append(await asked)
            await _wait_until_indexed(environment, "search-documents")
            bench.progress.advance()
        stored, documents, seconds = 0, 0, 0.0
        for size in sizes:
            started = time.perf_counter()
            documents += await _create(stub, users[0], stored, size)
            await _wait_until_indexed(environment, "search-documents")
            seconds += time.perf_counter() - started
            stored = size
            p50_ms[str(size)] = round(await _search(stub, users[0], plan.searches), 1)
            bench.progress.advance()
        memory = {
            "server": server.rss,
            "child": sum(c.memory_info().rss for c in psutil.Process(server.pid).children()),
        }
    pairs = zip(busy, quiet, strict=True)
    return {
        "documents_per_second": round(documents / seconds, 1),
        "chunks_per_second": round(stored / seconds),
        "search_p50_ms": p50_ms,
        "others_chunks": 1_000 * plan.rounds,
        "context_p99_us": {
            "quiet": median(each.p99_us for each in quiet),
            "indexing": median(each.p99_us for each in busy),
        },
        "context_p99_ratio": round(
            median(ours.p99_us / theirs.p99_us for ours, theirs in pairs), 2
        ),
        "health_worst_ms": round(max(health) * 1e3, 1),
        "memory": memory,
    }


async def _recall(environment: Environment, folder: Path) -> dict[str, float]:
    """Ask the labelled questions of a folder: how often the right section is first, or among the first five."""
    database = f"search-recall-{folder.name}"
    await environment.new_database(database)
    questions, texts = _labelled(folder)
    async with environment.service(database, database, **ON) as server, server.stub() as stub:
        await _search_ready(server)
        user_id = await _user(stub)
        for name, sections in texts.items():
            await stub.CreateDocument(_request(user_id, sections, name))
        await _wait_until_indexed(environment, database)
        places: list[int] = []
        for each in questions:
            request = document_pb2.SearchDocumentsRequest(
                user_id=user_id, query=each["question"], limit=5
            )
            hits = (await stub.SearchDocuments(request)).hits
            right = [
                hit.document.title == each["file"]
                and hit.text.startswith(f"## {each['heading']}\n")
                for hit in hits
            ]
            places.append(right.index(True) + 1 if True in right else 0)
    return {
        "questions": len(questions),
        "sections": sum(map(len, texts.values())),
        "first": round(sum(place == 1 for place in places) / len(places), 3),
        "recall_at_5": round(sum(place > 0 for place in places) / len(places), 3),
    }


def _labelled(folder: Path) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """Read a folder's questions, and its texts by name, cut at their headings."""
    with (folder / "questions.tsv").open(newline="") as file:
        questions = list(csv.DictReader(file, delimiter="\t"))
    return questions, {
        path.name: ["## " + part.strip() for part in path.read_text().split("\n## ")[1:]]
        for path in sorted(folder.glob("*.md"))
    }


async def _user(stub: Stub) -> str:
    return (
        await stub.CreateUser(user_pb2.CreateUserRequest(user=user_pb2.User(name="reader")))
    ).user.id


def _request(
    user_id: str, texts: Sequence[str], title: str = ""
) -> document_pb2.CreateDocumentRequest:
    return document_pb2.CreateDocumentRequest(
        user_id=user_id,
        document=document_pb2.Document(title=title),
        chunks=[document_pb2.DocumentChunk(text=text) for text in texts],
    )


async def _create(stub: Stub, user_id: str, first: int, end: int) -> int:
    """Store documents until there are so many chunks; return how many documents."""
    starts = range(first, end, _CHUNKS)
    for start in starts:
        await stub.CreateDocument(
            _request(user_id, [f"{start + n} {_CHUNK}" for n in range(_CHUNKS)])
        )
    return len(starts)


async def _search(stub: Stub, user_id: str, times: int) -> float:
    """Return the median in milliseconds."""
    took: list[float] = []
    for n in range(times):
        request = document_pb2.SearchDocumentsRequest(
            user_id=user_id, query=f"{n} what does the animal do when it rains"
        )
        started = time.perf_counter()
        reply = await stub.SearchDocuments(request)
        took.append(time.perf_counter() - started)
        assert len(reply.hits) == _HITS  # noqa: S101 - a figure of failed searches is none
    return median(took) * 1e3


async def _check(channel: grpc.aio.Channel, name: str) -> bool:
    call: Any = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    reply = await call(health_pb2.HealthCheckRequest(service=name))
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def _search_ready(server: Server) -> None:
    async with asyncio.timeout(30), grpc.aio.insecure_channel(server.address) as channel:
        while not await _check(channel, "search"):  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.1)


async def _health(server: Server, until: asyncio.Task[Any]) -> float:
    """Ask for readiness until something is over; return the longest that an answer took, in seconds."""
    worst = 0.0
    async with grpc.aio.insecure_channel(server.address) as channel:
        while not until.done():
            started = time.perf_counter()
            await _check(channel, "")
            worst = max(worst, time.perf_counter() - started)
            await asyncio.sleep(0.02)
    return worst


async def _pending_messages(environment: Environment, database: str) -> int:
    async with environment.connect(database) as connection:
        return int(await connection.fetchval(_ENQUEUE))


async def _wait_until_indexed(environment: Environment, database: str) -> float:
    """Wait until the index owes nothing; return the seconds that it took."""
    started = time.perf_counter()
    async with asyncio.timeout(_DRAIN_SECONDS), environment.connect(database) as connection:
        while await connection.fetchval("SELECT count(*) FROM search_outbox"):  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.05)
    return time.perf_counter() - started
