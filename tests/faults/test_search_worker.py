"""A search process that stops, has no memory, or cannot write; and an index that is full."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from chathistory.v1 import document_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.search import index_writer
from service.search.index_writer import IndexWriter, WriteFailed
from service.search.service import Search
from service.search.types import Changes, IndexingStats, SearchUnavailable, TextBlocked
from service.search.worker import heartbeat, parent
from service.search.worker.parent import SearchProcess
from service.server import Server
from tests.search.embedded_index import read_payloads
from tests.search.faulty_model import HANG, FaultyModel
from tests.search.library import INDEXED, SEMANTIC, Library
from tests.search.qdrant_server import QdrantServer
from tests.search.waits import (
    wait_until,
    wait_until_built,
    wait_until_indexed,
    wait_until_searchable,
)
from tests.support.chat import Chat
from tests.support.failures import assert_fails
from tests.support.servers import channel, connected, serving

FAILED = document_pb2.DOCUMENT_STATUS_FAILED
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


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


@pytest.fixture
async def qdrant() -> AsyncGenerator[QdrantServer]:
    """Yield a Qdrant that serves gRPC."""
    qdrant = QdrantServer()
    await qdrant.start()
    yield qdrant
    await qdrant.stop()
    await qdrant.engine.close()


def process_of(server: Server) -> SearchProcess:
    assert isinstance(server.search, Search)
    assert server.search._process is not None
    return server.search._process


def pid_of(server: Server) -> int:
    pid = process_of(server).pid
    assert pid is not None
    return pid


def record_health(server: Server) -> list[bool]:
    """Return a list to which every later change of the health of search is appended."""
    changes: list[bool] = []
    report = server.search.on_change

    def record() -> None:
        changes.append(server.search.is_healthy)
        report()

    server.search.on_change = record
    return changes


async def wait_for_health(server: Server, status: Any) -> None:
    """Wait until the health name `search` has a status; the service itself is always SERVING."""
    async with channel(server.address) as opened:
        health: Any = health_pb2_grpc.HealthStub(opened)

        async def has_status() -> bool:
            search = await health.Check(health_pb2.HealthCheckRequest(service="search"))
            service = await health.Check(health_pb2.HealthCheckRequest())
            assert service.status == SERVING
            return bool(search.status == status)

        await wait_until(has_status, f"search has the status {status}")


@asynccontextmanager
async def captured_logs() -> AsyncGenerator[list[Any]]:
    """Yield the list of events that are logged from now on."""
    with structlog.testing.capture_logs() as events:
        yield events


# --- A process that does not run.


@pytest.mark.case(n=523)
async def test_stopped_process_is_reported_and_started_again(
    server: Server, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.3)
    document = await library.create(["Herons are wading birds."], title="birds")
    await wait_until_indexed(server)
    pid = pid_of(server)
    os.kill(pid, signal.SIGSTOP)  # No request waits for it.
    await wait_for_health(server, NOT_SERVING)
    await assert_fails(library.search("which bird wades"), "SEARCH_UNAVAILABLE")
    await wait_for_health(server, SERVING)
    assert pid_of(server) != pid
    assert process_of(server).restart_count == 1
    assert [hit.document.id for hit in await library.search("which bird wades")] == [document.id]


@pytest.mark.case(n=523)
async def test_stopped_process_that_continues_is_kept(
    server: Server, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.3)
    monkeypatch.setattr(heartbeat, "DEAD_AFTER", 10_000)
    await library.create(["Herons are wading birds."], title="birds")
    await wait_until_indexed(server)
    pid = pid_of(server)
    os.kill(pid, signal.SIGSTOP)
    await wait_for_health(server, NOT_SERVING)
    os.kill(pid, signal.SIGCONT)
    await wait_for_health(server, SERVING)
    assert pid_of(server) == pid
    assert process_of(server).restart_count == 0
    assert len(await library.search("which bird wades")) == 1


@pytest.mark.case(n=523)
async def test_stopped_process_is_reported_with_a_qdrant_server(
    database_url: str, qdrant: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qdrant responds, and only the embeddings do not."""
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.3)
    async with serving(database_url, **qdrant.settings) as server:
        await wait_until_searchable(server)
        pid = pid_of(server)
        os.kill(pid, signal.SIGSTOP)
        await wait_for_health(server, NOT_SERVING)
        await wait_for_health(server, SERVING)
        assert pid_of(server) != pid


async def test_process_that_computes_for_long_is_not_taken_for_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FaultyModel(monkeypatch, tmp_path)
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.8)
    monkeypatch.setattr(parent, "REPLY_TIMEOUT_S", 6.0)
    process = SearchProcess()
    reports: list[str] = []
    process.on_unresponsive = lambda: reports.append("unresponsive")
    await process.call("dimensions")
    with structlog.testing.capture_logs() as events, pytest.raises(TextBlocked):
        await process.call("embed", [f"it {HANG}"])
    await process.close()
    assert reports == []
    operations = [event["operation"] for event in events if "stuck" in event["event"]]
    assert operations == ["embed", "embed"], "ended by the timeouts of the replies"


# --- A process without memory.


@pytest.mark.case(n=523)
def test_process_ends_when_an_allocation_fails() -> None:
    program = """
import asyncio
from service.search.worker import child, framing

async def allocate(_argument, _blob):
    return bytearray(1 << 60), b""

asyncio.run(child._answer({"write": allocate}, framing.Frame([1, "write", None], b"")))
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert ended.returncode == 12


@pytest.mark.case(n=523)
async def test_process_without_memory_is_started_again_and_indexing_continues(
    server: Server, library: Library
) -> None:
    kept = await library.create(["The ferry runs all night."])
    await wait_until_indexed(server)
    pid = pid_of(server)
    _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (1, hard))
    texts = [f"chunk {n} " + "word " * 1_500 for n in range(100)]
    document = await library.create(texts)

    async def is_indexed() -> bool:
        return (await library.get(document.id)).status == INDEXED

    await wait_until(is_indexed, "a new process continues")
    assert pid_of(server) != pid
    await wait_until_searchable(server)
    hits = await library.search("boat at midnight", document_ids=[kept.id])
    assert [hit.document.id for hit in hits] == [kept.id]


# --- A disk that is full.


class FailingIndex:
    """An index that answers searches, and accepts no writes while `fails` is set."""

    max_points: int | None = None
    is_full = False

    def __init__(self) -> None:
        self.fails = True

    async def open(self) -> bool:
        return True

    async def write(self, _changes: Changes, _building: str | None) -> None:
        if self.fails:
            raise SearchUnavailable("the disk is full")


@pytest.mark.case(n=505)
async def test_pauses_after_failed_writes_grow_until_a_write_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    async def record(pause_s: float) -> None:
        pauses.append(pause_s)

    monkeypatch.setattr(index_writer, "asyncio", SimpleNamespace(sleep=record))
    monkeypatch.setattr(
        index_writer,
        "backoff",
        lambda attempt, *, base_s, cap_s: min(cap_s, base_s * 2**attempt),
    )
    index: Any = FailingIndex()
    writer = IndexWriter(index, IndexingStats())
    for _ in range(10):
        with pytest.raises(WriteFailed):
            await writer.write(Changes(), None)
        assert await writer.is_searchable(), "which does not end the back-off"
        await writer.pause("the disk is full")
    assert pauses == sorted(pauses)
    assert pauses[0] < 2
    assert pauses[-1] >= 60
    index.fails = False
    await writer.write(Changes(), None)
    index.fails = True
    with pytest.raises(WriteFailed):
        await writer.write(Changes(), None)
    await writer.pause("the disk is full")
    assert pauses[-1] == pauses[0]


def limit_files(pid: int, size: int) -> int:
    """Limit the size of the files that a process writes; return the former limit."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    return soft


@pytest.mark.case(n=505)
async def test_index_that_accepts_no_writes_stays_searchable_and_catches_up(
    server: Server, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_writer, "PAUSE_BASE_S", 0.05)
    document = await library.create(["Herons are wading birds."], title="birds")
    await wait_until_indexed(server)
    changes = record_health(server)
    pid = pid_of(server)
    assert isinstance(server.search, Search)
    assert server.search._indexer is not None
    writer = server.search._indexer._writer
    with structlog.testing.capture_logs() as events:
        former = limit_files(pid, 1)
        late = await library.create(["Swifts live in the air."], title="birds")

        async def has_failed() -> bool:
            return writer.failed_count >= 4

        await wait_until(has_failed, "writes fail")
        assert (await library.search("which bird wades"))[0].document.id == document.id
        await library.chat.start("a commit does not end the pause")
        limit_files(pid, former)
        await wait_until_indexed(server)
    assert (await library.get(late.id)).status == INDEXED
    assert writer.failed_count == 0
    assert changes == [], "search was available throughout"
    assert pid_of(server) == pid
    named = [event for event in events if "accepts" in event["event"]]
    assert [event["event"] for event in named] == [
        "the search index accepts no writes",
        "the search index accepts writes again",
    ]
    assert "embedded index cannot be written" in named[0]["problem"]


@pytest.mark.case(n=505)
async def test_deletion_that_could_not_be_stored_leaves_the_files_afterwards(
    server: Server, library: Library, tmp_path: Path
) -> None:
    deleted = await library.create(["Herons are wading birds."], title="birds")
    kept = await library.create(["Swifts live in the air."], title="birds")
    await wait_until_indexed(server)
    pid = pid_of(server)
    limit_files(pid, 1)
    await library.delete(deleted.id)
    # The process that could not store it ends, and the next one has no limit.
    await wait_until_indexed(server)
    assert pid_of(server) != pid
    await server.stop()
    assert {payload["entity_id"] for payload in read_payloads(tmp_path)} == {kept.id}


# --- An index that is full.


@pytest.mark.case(n=523)
async def test_full_index_takes_no_new_points_and_everything_else_works(
    database_url: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"search": "on", "data_dir": tmp_path}
    async with (
        captured_logs() as events,
        serving(database_url, index_max_points=20, **options) as server,
        connected(server.address) as stub,
    ):
        await wait_until_searchable(server)
        await wait_until_built(server)
        library = Library(await Chat.of_new_user(stub))
        first = await library.create([f"Herons wade, part {n}." for n in range(15)])
        session_id = await library.chat.start("storks nest on chimneys")
        await wait_until_indexed(server)
        late = await library.create([f"Swifts fly, part {n}." for n in range(8)])

        async def is_refused() -> bool:
            return (await library.get(late.id)).status == FAILED

        await wait_until(is_refused, "the document has found no room")
        assert "set QDRANT_URL" in (await library.get(late.id)).status_detail
        assert server.search.stats.is_full
        assert server.search.is_healthy
        assert (await library.search("herons", limit=1))[0].document.id == first.id
        # Points of the index can be changed; a new message waits as a dead letter.
        (message,) = (await library.chat.page(session_id)).messages
        await library.chat.update(session_id, message.id, content="gulls steal chips")
        await library.chat.append(session_id, "terns dive")
        await wait_until_indexed(server)
        messages = await library.search_messages("birds that take food", SEMANTIC)
        assert [hit.message.content for hit in messages] == ["gulls steal chips"]
        # Deleted points make room.
        await library.delete(first.id)
        await wait_until_indexed(server)
        new = await library.create([f"Owls hunt at night, part {n}." for n in range(6)])
        await wait_until_indexed(server)
        assert (await library.get(new.id)).status == INDEXED
        hits = await library.search("birds", limit=100)
        assert {hit.document.id for hit in hits} == {late.id, new.id}
        names = [event["event"] for event in events]
        assert names.count("the search index is full") == 1
        assert names.count("the search index has room again") == 1
        assert "entity rejected by the index" not in names
    # The dead letters are indexed at the next start, for which there is room.
    async with (
        serving(database_url, index_max_points=40, **options) as server,
        connected(server.address) as stub,
    ):
        await wait_until_searchable(server)
        library = Library(Chat(stub, library.user_id))

        async def is_indexed() -> bool:
            return (await library.get(late.id)).status == INDEXED

        await wait_until(is_indexed, "the document that found no room")
        await wait_until_indexed(server)
        messages = await library.search_messages("a bird that dives", SEMANTIC)
        assert {hit.message.content for hit in messages} == {"gulls steal chips", "terns dive"}
