"""The default: Qdrant's local mode and the offline embeddings, in the search process."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from chathistory.v1 import document_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.search.service import Search
from service.search.types import unpack_vector
from service.server import Server
from tests.search.embedded_index import damaged_files, read_payloads
from tests.search.library import HYBRID, INDEXED, SEMANTIC, SHARED, Library
from tests.search.sections import TEXTS, sections
from tests.search.waits import wait_until, wait_until_indexed, wait_until_searchable
from tests.support.chat import Chat
from tests.support.cluster import fetch
from tests.support.failures import assert_fails
from tests.support.servers import channel, connected, serving

pytestmark = pytest.mark.faults  # Slow.

# Questions in other words than the texts', with the file and the section that answer them.
QUESTIONS = [
    (
        "how long may I stay in the reading room at night when the desk is empty",
        "library.md",
        "late hours",
    ),
    ("the pump stopped bringing up water, what can I do", "well.md", "priming"),
    ("is it dangerous to warm up food from yesterday twice", "kitchen.md", "reheating"),
    ("who pays when my suitcase gets lost on the train", "railway.md", "luggage"),
    ("how can I keep slugs away from young lettuce plants", "garden.md", "snails"),
]


async def test_questions_in_other_words_find_the_right_section(
    server: Server, library: Library, tmp_path: Path
) -> None:
    documents: dict[str, document_pb2.Document] = {}
    for path in sorted(TEXTS.glob("*.md")):
        documents[path.name] = await library.create(
            sections(path), title=path.stem, source_uri=path.as_uri()
        )
    assert len(documents) == 10
    assert all(document.chunk_count >= 3 for document in documents.values())
    await wait_until_indexed(server)
    right_count = 0
    for question, name, heading in QUESTIONS:
        hit = (await library.search(question))[0]
        is_right_section = hit.text.lower().startswith(f"## {heading}")
        right_count += hit.document.id == documents[name].id and is_right_section
    assert right_count >= 4
    deleted = documents.pop("well.md")
    await library.delete(deleted.id)
    await wait_until_indexed(server)
    hits = await library.search(QUESTIONS[1][0], limit=100)
    assert deleted.id not in {hit.document.id for hit in hits}
    await server.stop()
    indexed = {payload["entity_id"] for payload in read_payloads(tmp_path)}
    assert indexed == {document.id for document in documents.values()}


@pytest.mark.case(n=19)
async def test_search_never_returns_another_users_content(
    server: Server, library: Library, others: Library
) -> None:
    text = "The treasure is buried below the oak."
    own = await library.create([text])
    shared = await library.create(["The museum opens at ten."], scope=SHARED)
    session = await library.chat.start("I buried the treasure")
    # The other user has a document and a session with the same ids.
    others_own = await others.create(["Nothing about money."], id=own.id)
    await others.chat.append(session, "nothing of interest", create_if_missing=True)
    await wait_until_indexed(server)
    assert isinstance(server.search, Search)
    assert server.search._embeddings is not None
    vector = unpack_vector(await server.search._embeddings.embed([text]))
    query = "where is the treasure buried"
    for search in (
        others.search(query, limit=100),
        others.search(query, limit=100, document_ids=[own.id, shared.id]),
        others.search(vector=vector, limit=100),
    ):
        hits = await search
        assert {(hit.document.user_id, hit.document.id) for hit in hits} <= {
            (others.user_id, others_own.id),
            (shared.user_id, shared.id),
        }
        assert not any("treasure" in hit.text for hit in hits)
    for mode in (SEMANTIC, HYBRID):
        for fields in ({}, {"session_id": session}):
            message_hits = await others.search_messages("buried treasure", mode, **fields)
            assert [hit.message.content for hit in message_hits] == ["nothing of interest"]
    museum = "opening hours of the museum"
    assert {hit.document.id for hit in await library.search(museum)} == {own.id, shared.id}
    assert (await others.search(museum))[0].document.id == shared.id
    nearest = (await library.search(vector=vector))[0]
    assert nearest.document.id == own.id
    assert nearest.score == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    "rest",
    [" and more words" * 100, "\n" + "-" * 80 + "\nx", "- " * 2000],
    ids=["words", "rule", "-"],
)
async def test_hybrid_query_beyond_the_limits_of_lexical_search_is_answered(
    server: Server, library: Library, rest: str
) -> None:
    """The index compares the whole text; the first words, if any, are searched for as words."""
    await library.chat.start("a zebra crosses the street")
    await wait_until_indexed(server)
    for mode in (SEMANTIC, HYBRID):
        (hit,) = await library.search_messages("a zebra crosses" + rest, mode)
        assert hit.message.content == "a zebra crosses the street"


async def test_given_vector_is_searchable_if_it_has_the_index_dimension(
    server: Server, library: Library
) -> None:
    vector = [1.0] + [0.0] * 255
    request = document_pb2.CreateDocumentRequest(
        user_id=library.user_id,
        document=document_pb2.Document(),
        chunks=[document_pb2.DocumentChunk(text="by hand", vector=vector)],
    )
    document = (await library.stub.CreateDocument(request)).document
    await wait_until_indexed(server)
    (hit,) = await library.search(vector=vector)
    assert hit.document.id == document.id
    assert hit.score == pytest.approx(1.0)
    for search in (
        library.search(vector=[1.0]),
        library.search(),
        library.search("both", vector=vector),
    ):
        await assert_fails(search, "FIELD_VIOLATION")
    request.chunks[0].vector.pop()
    await assert_fails(library.stub.CreateDocument(request), "FIELD_VIOLATION")


async def test_vector_of_another_dimension_is_rejected_and_blocks_no_other_document(
    database_url: str, tmp_path: Path
) -> None:
    # With search off the dimension is unknown, so that the vector is stored.
    async with serving(database_url, search="off") as server, connected(server.address) as stub:
        library = Library(await Chat.of_new_user(stub))
        chunk = document_pb2.DocumentChunk(text="x", vector=[1.0, 2.0])
        request = document_pb2.CreateDocumentRequest(
            user_id=library.user_id, document=document_pb2.Document(), chunks=[chunk]
        )
        rejected = (await stub.CreateDocument(request)).document
    async with (
        serving(database_url, search="on", data_dir=tmp_path) as server,
        connected(server.address) as stub,
    ):
        await wait_until_searchable(server)
        library = Library(Chat(stub, library.user_id))
        valid = await library.create(["this one is fine"])

        async def read_outbox() -> tuple[int, str]:
            sql = "SELECT attempts, detail FROM search_outbox WHERE entity_id = $1"
            rows = await fetch(database_url, sql, rejected.id)
            return (rows[0][0], rows[0][1]) if rows else (0, "")

        async def is_each_tried() -> bool:
            is_valid_indexed = (await library.get(valid.id)).status == INDEXED
            return is_valid_indexed and (await read_outbox())[0] >= 1

        await wait_until(is_each_tried, "one document is indexed and the other rejected")
        assert "dimension 2" in (await read_outbox())[1]


async def test_killed_search_process_is_restarted(server: Server, library: Library) -> None:
    await library.create(["The bridge is closed on Sundays."])
    await wait_until_indexed(server)
    assert isinstance(server.search, Search)
    assert server.search._process is not None
    pid = server.search._process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    document = await library.create(["The ferry runs all night."])

    async def is_indexed() -> bool:
        return (await library.get(document.id)).status == INDEXED

    await wait_until(is_indexed, "the new search process continues")
    await wait_until_searchable(server)
    assert (await library.search("boat at midnight"))[0].document.id == document.id
    assert server.search._process.pid not in (None, pid)


@pytest.mark.parametrize("file_name", ["meta.json", "storage.sqlite"])
async def test_damaged_index_is_moved_and_rebuilt_from_postgres(
    server: Server, library: Library, database_url: str, tmp_path: Path, file_name: str
) -> None:
    document = await library.create(["The bakery opens at five."])
    await wait_until_indexed(server)
    await server.stop()
    (path,) = (tmp_path / "qdrant").rglob(file_name)
    path.write_bytes(b"cut o")
    # SQLite would restore its file from the log, which may hold every page of a small index.
    path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
    async with (
        serving(database_url, search="on", data_dir=tmp_path) as restarted,
        connected(restarted.address) as stub,
    ):
        await wait_until_searchable(restarted)
        library = Library(Chat(stub, library.user_id))

        async def is_found() -> bool:
            hits = await library.search("when is there bread")
            return [hit.document.id for hit in hits] == [document.id]

        await wait_until(is_found, "the index is rebuilt")
    moved = [path for path in damaged_files(tmp_path) if path.name == file_name]
    assert any(path.read_bytes() == b"cut o" for path in moved)


async def test_index_that_another_process_has_open_is_not_touched(
    server: Server, library: Library, database_url: str, tmp_path: Path
) -> None:
    await library.create(["The bakery opens at five."])
    await wait_until_indexed(server)
    async with serving(database_url, search="on", data_dir=tmp_path) as second:
        search = second.search
        assert isinstance(search, Search)

        async def is_reported() -> bool:
            return "another process" in search.problem

        await wait_until(is_reported, "the second server reports why search is unavailable")
        assert not search.is_healthy
    assert len(await library.search("when is there bread")) == 1
    assert not damaged_files(tmp_path)


@pytest.mark.timeout(300)
async def test_killed_servers_lose_no_change(
    database_url: str, tmp_path: Path, start_process: Any
) -> None:
    environment = {"CHAT_HISTORY_SEARCH": "on", "CHAT_HISTORY_DATA_DIR": str(tmp_path / "data")}
    for run in range(3):
        process = await start_process(**environment)
        async with connected(process.address) as stub:
            library = Library(await Chat.of_new_user(stub))
            documents = [await library.create([f"run {run}, text {n}"]) for n in range(8)]
            await library.delete(documents[0].id)
            await library.chat.start(f"message of run {run}")
            await asyncio.sleep(0.15 * run)
        await process.kill()
    process = await start_process(**environment)

    async def is_outbox_empty() -> bool:
        return not await fetch(database_url, "SELECT FROM search_outbox")

    # Rows that a killed server had claimed are due again when its lease has expired.
    await wait_until(is_outbox_empty, "everything is indexed", timeout_s=100)
    await process.stop()
    chunks = await fetch(
        database_url, "SELECT user_id::text, document_id::text FROM document_chunks"
    )
    messages = await fetch(
        database_url, "SELECT user_id::text, session_id::text FROM chat_messages"
    )
    payloads = read_payloads(tmp_path / "data")
    indexed = sorted((payload["user_id"], payload["entity_id"]) for payload in payloads)
    assert indexed == sorted(tuple(row) for row in [*chunks, *messages])
    assert len(indexed) == 3 * 8


@pytest.mark.timeout(180)
async def test_indexing_does_not_block_the_event_loop(server: Server, library: Library) -> None:
    session = await library.chat.start("hello")
    for n in range(20):
        await library.chat.append(session, f"message {n}")

    # The processor time of the loop's thread, which other processes on the machine do not affect.
    async def p99_s(duration_s: float) -> float:
        cpu_times: list[float] = []
        end = time.perf_counter() + duration_s
        while time.perf_counter() < end:
            started = time.thread_time()
            await library.chat.context(session, max_messages=20)
            cpu_times.append(time.thread_time() - started)
            await asyncio.sleep(0.002)
        return sorted(cpu_times)[int(len(cpu_times) * 0.99)]

    await wait_until_indexed(server)
    quiet_s = await p99_s(3)
    text = "The quick brown fox jumps over the lazy dog, for a reason that is not known. " * 10
    for n in range(10):
        await library.create([f"{text} {n} {m}" for m in range(100)])
    busy_s = await p99_s(1.0)
    slowest_s = 0.0
    async with channel(server.address) as opened:
        health: Any = health_pb2_grpc.HealthStub(opened)
        for _ in range(50):
            started = time.thread_time()
            await health.Check(health_pb2.HealthCheckRequest())
            slowest_s = max(slowest_s, time.thread_time() - started)
            await asyncio.sleep(0.01)
    # A page that was embedded or indexed on the loop would take 0.3 s of it. The latency that
    # clients see is measured by benchmarks/search_scenario.py.
    assert slowest_s < 0.1
    assert busy_s < max(10 * quiet_s, 0.1)
