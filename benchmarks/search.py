"""`python -m benchmarks.search`: documents and search, in the embedded default.

- appends with message indexing on, while the outbox is drained, beside appends with search off;
- documents and chunks indexed a second;
- SearchDocuments at 10^3 and 10^4 chunks;
- GetContext while 1,000 chunks are indexed, beside the same in quiet;
- recall@5 of the offline embeddings on the labelled questions of tests/search/texts.
"""

from __future__ import annotations

import asyncio
import csv
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import grpc
from chathistory.v1 import document_pb2, user_pb2
from grpc_health.v1 import health_pb2

from benchmarks import work
from benchmarks.compare import Figures, Subject, once
from benchmarks.driver import Load
from benchmarks.stack import ROOT, WORK, Server, Stack

TEXTS = ROOT / "tests" / "search" / "texts"
ON = {"CHAT_HISTORY_SEARCH": "on"}
SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody knows why it does such a thing on a rainy day. "
CHUNK = SENTENCE * 8
"""About 800 characters, as chunkers cut them."""
ROUNDS = 3
SECONDS = 3.0
QUERIES = 60
HITS = 10
SMALL = 1_000

if TYPE_CHECKING:
    from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceAsyncStub as Stub


async def measure(stack: Stack, *, quick: bool = False) -> dict[str, Any]:
    """Take all figures."""
    rounds, large = (1, 2_000) if quick else (ROUNDS, 10_000)
    return {
        "append": await appends(stack, rounds),
        "documents": await documents(stack, large),
        "recall": await recall(stack),
    }


async def appends(stack: Stack, rounds: int) -> dict[str, float]:
    """Append at 64 in flight with message indexing and without, in turn; the outbox is empty before each round."""
    subjects: list[tuple[str, Subject]] = []
    figures: dict[str, list[Figures]] = {"off": [], "on": []}
    load = Load(64, SECONDS)
    for name in figures:
        await stack.new_database(f"append-{name}")
    async with (
        stack.service("append-off", "append-off") as off,
        stack.service("append-on", "append-on", **ON) as on,
    ):
        for name, server in (("off", off), ("on", on)):
            keys = work.new_sessions(200)
            async with stack.connect(f"append-{name}") as connection:
                await work.seed(connection, keys)
            bodies = work.append_bodies(keys, 40_000)
            subjects.append((name, Subject(name, server, "AppendMessages", bodies)))
        await _search_ready(on)
        drained = 0.0
        waiting = 0
        for _ in range(rounds):
            for name, subject in subjects:
                figures[name].append(await once(stack, subject, load, stack.folder))
                if name == "on":
                    waiting = await _waiting(stack, "append-on")
                    started = time.perf_counter()
                    await _drained(stack, "append-on")
                    drained = time.perf_counter() - started
    rates = {name: median(each.calls_per_second for each in taken) for name, taken in figures.items()}
    pairs = zip(figures["on"], figures["off"], strict=True)
    return {
        "off_per_second": rates["off"],
        "on_per_second": rates["on"],
        "share": median(a.calls_per_second / b.calls_per_second for a, b in pairs),
        "off_server_us": median(each.cpu_us_per_call for each in figures["off"]),
        "on_server_us": median(each.cpu_us_per_call for each in figures["on"]),
        "off_postgres_us": median(each.postgres_us_per_call for each in figures["off"]),
        "on_postgres_us": median(each.postgres_us_per_call for each in figures["on"]),
        "sessions_waiting_at_the_end": waiting,
        "seconds_to_drain": drained,
    }


async def documents(stack: Stack, large: int) -> dict[str, float]:
    """Index documents, search them, and read contexts meanwhile."""
    await stack.new_database("documents")
    figures: dict[str, float] = {}
    keys = work.new_sessions(50)
    async with stack.connect("documents") as connection:
        await work.seed(connection, keys, work.SESSION_MESSAGES)
    async with stack.service("documents", "documents", **ON) as server, server.stub() as stub:
        await _search_ready(server)
        await _drained(stack, "documents")
        user_id = (await stub.CreateUser(user_pb2.CreateUserRequest(user=user_pb2.User(name="reader")))).user.id
        contexts = Subject("documents", server, "GetContext", work.context_bodies(keys), cycle=True)
        quiet = await once(stack, contexts, Load(4, SECONDS), stack.folder)
        stored = 0
        for size in (SMALL, large):
            started = time.perf_counter()
            made = await _create(stub, user_id, stored, size)
            if size == SMALL:
                busy = await once(stack, contexts, Load(4, 1.0, warmup=0.0), stack.folder)
                figures |= {"context_p99_quiet_us": quiet.p99_us, "context_p99_indexing_us": busy.p99_us}
                worst = await _health(server, 30)
                figures["health_worst_ms"] = worst * 1e3
            await _drained(stack, "documents")
            seconds = time.perf_counter() - started
            if size != SMALL:
                figures |= {"chunks_per_second": (size - stored) / seconds, "documents_per_second": made / seconds}
            stored = size
            figures[f"search_p50_ms_at_{size}"] = await _search(stub, user_id)
        figures["rss_server_mb"] = server.rss / 2**20
    return figures


async def recall(stack: Stack) -> dict[str, float]:
    """Ask the labelled questions: how often the right section is first, or among the first five."""
    await stack.new_database("recall")
    with (TEXTS / "questions.tsv").open(newline="") as file:
        questions = list(csv.DictReader(file, delimiter="\t"))
    async with stack.service("recall", "recall", **ON) as server, server.stub() as stub:
        await _search_ready(server)
        user_id = (await stub.CreateUser(user_pb2.CreateUserRequest(user=user_pb2.User(name="reader")))).user.id
        files = sorted(TEXTS.glob("*.md"))
        for path in files:
            sections = ["## " + part.strip() for part in path.read_text().split("\n## ")[1:]]
            await stub.CreateDocument(_request(user_id, sections, path.name))
        await _drained(stack, "recall")
        places: list[int] = []
        for each in questions:
            request = document_pb2.SearchDocumentsRequest(user_id=user_id, query=each["question"], limit=5)
            hits = (await stub.SearchDocuments(request)).hits
            right = [
                hit.document.title == each["file"] and hit.text.startswith(f"## {each['heading']}\n") for hit in hits
            ]
            places.append(right.index(True) + 1 if True in right else 0)
    return {
        "questions": len(questions),
        "sections": sum(path.read_text().count("\n## ") for path in files),
        "first": sum(place == 1 for place in places) / len(places),
        "recall_at_5": sum(place > 0 for place in places) / len(places),
    }


def _request(user_id: str, texts: Sequence[str], title: str = "") -> document_pb2.CreateDocumentRequest:
    return document_pb2.CreateDocumentRequest(
        user_id=user_id,
        document=document_pb2.Document(title=title),
        chunks=[document_pb2.DocumentChunk(text=text) for text in texts],
    )


async def _create(stub: Stub, user_id: str, first: int, end: int, chunks: int = 20) -> int:
    """Store documents until there are so many chunks; return how many documents."""
    starts = range(first, end, chunks)
    for start in starts:
        texts = [f"{start + n} {CHUNK}" for n in range(chunks)]
        await stub.CreateDocument(_request(user_id, texts))
    return len(starts)


async def _search(stub: Stub, user_id: str) -> float:
    took: list[float] = []
    for n in range(QUERIES):
        request = document_pb2.SearchDocumentsRequest(
            user_id=user_id, query=f"{n} what does the animal do when it rains"
        )
        started = time.perf_counter()
        reply = await stub.SearchDocuments(request)
        took.append(time.perf_counter() - started)
        assert len(reply.hits) == HITS  # noqa: S101 - a figure of failed searches is none
    return median(took) * 1e3


async def _check(server: Server, name: str) -> bool:
    async with grpc.aio.insecure_channel(server.address) as opened:
        call = opened.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        reply = await call(health_pb2.HealthCheckRequest(service=name))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def _search_ready(server: Server) -> None:
    async with asyncio.timeout(30):
        while not await _check(server, "search"):  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.1)


async def _health(server: Server, times: int) -> float:
    worst = 0.0
    for _ in range(times):
        started = time.perf_counter()
        await _check(server, "")
        worst = max(worst, time.perf_counter() - started)
    return worst


async def _waiting(stack: Stack, database: str) -> int:
    async with stack.connect(database) as connection:
        return int(await connection.fetchval("SELECT count(*) FROM search_outbox"))


async def _drained(stack: Stack, database: str) -> None:
    async with asyncio.timeout(300):
        while await _waiting(stack, database):  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.1)


async def _main() -> None:
    WORK.mkdir(exist_ok=True)
    async with Stack() as stack:
        for part, figures in (await measure(stack, quick="--quick" in sys.argv)).items():
            print(part)  # noqa: T201
            for name, value in figures.items():
                print(f"  {name:30} {value:12.2f}")  # noqa: T201


if __name__ == "__main__":
    asyncio.run(_main())
