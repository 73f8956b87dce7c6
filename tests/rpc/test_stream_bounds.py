"""Streams that are not read hold little, and exports are complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from chathistory.v1 import document_pb2, export_pb2

from service.ids import SYSTEM_USER_ID
from service.rpc.byte_budget import ByteBudget
from service.rpc.export import UserExport
from service.server import Server
from service.store.bounded_reads import STREAM_PAGE_BYTES
from tests.support.chat import Chat, new_message, new_messages
from tests.support.cluster import fetch
from tests.support.servers import AsyncStub, channel, connected, serving

MIB = 1024 * 1024
STREAMS = 100
NIL_ID = SYSTEM_USER_ID


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    """Provide a server with the smallest budget for a user."""
    async with serving(database_url, max_bytes_per_user=8 * MIB) as server:
        yield server


@asynccontextmanager
async def unread(open_stream: Callable[[], Any], count: int) -> AsyncGenerator[list[Any]]:
    """Open streams and read one reply of the first only."""
    streams = [open_stream() for _ in range(count)]
    try:
        yield streams
    finally:
        for stream in streams:
            stream.cancel()


def export_of(chat: Chat) -> Any:
    return chat.stub.ExportUserData(export_pb2.ExportUserDataRequest(user_id=chat.user_id))


async def export_items(chat: Chat) -> list[export_pb2.ExportUserDataResponse]:
    return [item async for item in export_of(chat)]


def record_peak(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Record the most bytes that each user has held."""
    peaks: dict[str, int] = {}
    add = ByteBudget.add

    def recorded(budget: ByteBudget, owner_id: str, connection: str, n_bytes: int) -> None:
        add(budget, owner_id, connection, n_bytes)
        peaks[owner_id] = max(peaks.get(owner_id, 0), budget._users[owner_id])

    monkeypatch.setattr(ByteBudget, "add", recorded)
    return peaks


@pytest.mark.parametrize("kind", ["watches", "exports"])
async def test_unread_streams_hold_a_bounded_part_of_the_budget_and_wait_in_the_database(
    server: Server, chat: Chat, other: Chat, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = (await chat.create_session()).id
    for _ in range(20):
        await chat.append(session_id, [new_message("x" * 15_000) for _ in range(20)])
    peaks = record_peak(monkeypatch)
    # Each client has a window of its own, which stops the server after a few messages.
    async with channel(
        server.address, **{"http2.lookahead_bytes": 65_536, "http2.bdp_probe": 0}
    ) as narrow:
        slow = Chat(type(chat.stub)(narrow), chat.user_id)
        open_stream = (
            (lambda: slow.watch(session_id)) if kind == "watches" else (lambda: export_of(slow))
        )
        async with unread(open_stream, STREAMS) as streams:
            async with asyncio.timeout(30):
                while not server.budget.waiting_count or server.streams.in_flight < STREAMS:
                    await asyncio.sleep(0.01)
            # Streams that wait in the database keep no other call out, not even the user's own.
            assert len((await chat.page(session_id, page_size=5)).messages) == 5
            theirs = await other.start(new_messages(3))
            assert len((await other.page(theirs)).messages) == 3
            assert len(await export_items(other)) == 5
            # All of them end when they are read.
            first = streams[0]
            seqs = []
            if kind == "watches":
                for stream in streams[1:]:
                    stream.cancel()
                async for reply in first:
                    seqs.append(reply.message.seq)
                    if len(seqs) == 400:
                        break
                assert seqs == list(range(1, 401))
    assert peaks[chat.user_id] <= server.budget.per_user // 2 + 2 * MIB
    async with asyncio.timeout(30):
        while server.budget.held:
            await asyncio.sleep(0.01)


async def test_stream_holds_at_most_a_page_while_it_is_not_read(server: Server, chat: Chat) -> None:
    session_id = (await chat.create_session()).id
    for _ in range(20):
        await chat.append(session_id, [new_message("x" * 15_000) for _ in range(20)])
    async with channel(
        server.address, **{"http2.lookahead_bytes": 65_536, "http2.bdp_probe": 0}
    ) as narrow:
        slow = Chat(type(chat.stub)(narrow), chat.user_id)
        async with unread(lambda: slow.watch(session_id), 5) as streams:
            for stream in streams:
                await stream.read()
            held: list[int] = []
            while len(held) < 50 or len(set(held[-50:])) > 1:  # Until flow control stops them.
                held.append(server.budget.held)
                await asyncio.sleep(0.01)
            assert 0 < held[-1] <= 5 * STREAM_PAGE_BYTES


async def test_rows_larger_than_a_page_are_sent_alone(server: Server, chat: Chat) -> None:
    session_id = (await chat.create_session()).id
    large = new_message("y" * 250_000, parts=[{"text": "y" * 250_000}])
    await chat.append(session_id, [new_message("small"), large, new_message("small")])
    document = document_pb2.Document(title="a title")
    chunks = [
        document_pb2.DocumentChunk(text="z" * 250_000, vector=[0.5] * 60_000),
        document_pb2.DocumentChunk(text="small"),
    ]
    await chat.stub.CreateDocument(
        document_pb2.CreateDocumentRequest(user_id=chat.user_id, document=document, chunks=chunks)
    )
    items = await export_items(chat)
    assert [item.WhichOneof("item") for item in items] == [
        "user",
        "session",
        *["message"] * 3,
        "document",
        *["chunk"] * 2,
    ]
    assert items[3].message.content == large.content
    assert list(items[6].chunk.vector) == [0.5] * 60_000
    watch = chat.watch(session_id)
    assert [(await watch.read()).message.seq for _ in range(3)] == [1, 2, 3]
    watch.cancel()


async def test_export_crosses_a_long_run_of_tombstones(
    server: Server, chat: Chat, database_url: str
) -> None:
    session_id = await chat.start(sent := new_messages(100))
    await fetch(
        database_url,
        "UPDATE chat_messages SET content = '', size = 0, deleted_at = now()"
        " WHERE user_id = $1 AND session_id = $2 AND seq BETWEEN 2 AND 99",
        chat.user_id,
        session_id,
    )
    items = await export_items(chat)
    assert [item.message.id for item in items[2:]] == [sent[0].id, sent[-1].id]
    watch = chat.watch(session_id)
    assert [(await watch.read()).message.seq for _ in range(2)] == [1, 100]
    watch.cancel()


async def test_session_and_document_with_the_nil_uuid_are_exported(
    server: Server, chat: Chat
) -> None:
    await chat.create_session(id=NIL_ID, title="nil")
    await chat.append(NIL_ID, "a message")
    await chat.create_session(title="another")
    await chat.stub.CreateDocument(
        document_pb2.CreateDocumentRequest(
            user_id=chat.user_id,
            document=document_pb2.Document(id=NIL_ID, title="nil"),
            chunks=[document_pb2.DocumentChunk(text="a text")],
        )
    )
    items = await export_items(chat)
    kinds = [item.WhichOneof("item") for item in items]
    assert kinds == ["user", "session", "message", "session", "document", "chunk"]
    assert items[1].session.id == items[4].document.id == NIL_ID


async def test_export_of_many_sessions_reads_each_page_once(
    server: Server, chat: Chat, database_url: str
) -> None:
    await fetch(
        database_url,
        "INSERT INTO chat_sessions (user_id, id, summary, fingerprint)"
        " SELECT $1, gen_random_uuid(), repeat('x', 1000), '' FROM generate_series(1, 250)",
        chat.user_id,
    )
    export = UserExport(server.database, chat.user_id, 30)
    ids = [item.session.id async for item in export.items() if item.HasField("session")]
    assert ids == sorted(ids)
    assert len(ids) == 250


async def test_watchers_are_woken_after_an_unexpected_error_of_a_poll(
    server: Server, chat: Chat, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await chat.start(new_messages(1))
    failed = asyncio.Event()
    notify = server.watchers._notify

    def fail_once(*args: Any) -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError
        notify(*args)

    monkeypatch.setattr(server.watchers, "_notify", fail_once)
    watch = chat.watch(session_id)
    assert (await watch.read()).message.seq == 1
    async with asyncio.timeout(10):
        await failed.wait()
    async with serving(database_url) as replica, connected(replica.address) as stub:
        stub_of_replica: AsyncStub = stub
        await Chat(stub_of_replica, chat.user_id).append(session_id, "another")
        async with asyncio.timeout(10):
            assert (await watch.read()).message.seq == 2
    watch.cancel()
