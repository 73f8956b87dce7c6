"""Large deletions: their slices, and the data that is left when a deletion is cut off."""

from __future__ import annotations

from typing import Any

import pytest
from chathistory.v1 import document_pb2, user_pb2

from service.errors import DeadlineExceeded
from service.server import Server
from service.store import slices
from service.store.db.work_class import WorkClass
from service.store.slices import Slices
from tests.support.chat import Chat, new_message, new_messages
from tests.support.cluster import fetch
from tests.support.failures import assert_fails

SESSIONS = """
SELECT s.id::text, s.message_count, s.last_seq,
       count(m.seq) FILTER (WHERE m.deleted_at IS NULL), min(m.seq), max(m.seq)
FROM chat_sessions AS s
LEFT JOIN chat_messages AS m ON m.user_id = s.user_id AND m.session_id = s.id
WHERE s.user_id = $1 GROUP BY s.user_id, s.id ORDER BY s.id
"""
DOCUMENTS = """
SELECT d.id::text, d.chunk_count, count(c.chunk_index), coalesce(max(c.chunk_index), -1)
FROM documents AS d
LEFT JOIN document_chunks AS c ON c.user_id = d.user_id AND c.document_id = d.id
WHERE d.user_id = $1 GROUP BY d.user_id, d.id ORDER BY d.id
"""


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "MESSAGES_PER_DELETE", 7)
    monkeypatch.setattr(slices, "CHUNKS_PER_DELETE", 7)


def cut_off_after(server: Server, monkeypatch: pytest.MonkeyPatch, slice_count: int) -> None:
    """Let the deadline of every deletion pass after some slices."""
    write = server.database.write
    count = 0

    async def limited_write(work: Any, **arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > slice_count:
            raise DeadlineExceeded("cut off by the test")
        assert arguments["work_class"] is WorkClass.EXPENSIVE
        return await write(work, **arguments)

    monkeypatch.setattr(server.database, "write", limited_write)


async def create_document(chat: Chat, chunk_count: int) -> str:
    request = document_pb2.CreateDocumentRequest(
        user_id=chat.user_id,
        document=document_pb2.Document(title="a document"),
        chunks=[document_pb2.DocumentChunk(text=f"chunk {n}") for n in range(chunk_count)],
    )
    return (await chat.stub.CreateDocument(request)).document.id


async def check_counts(database_url: str, user_id: str) -> tuple[int, int]:
    """Check the counts of a user's sessions and documents; return their sums."""
    messages = chunks = 0
    for id_, message_count, last_seq, count, first, last in await fetch(
        database_url, SESSIONS, user_id
    ):
        assert message_count == count, id_
        assert last_seq == 20, id_
        assert (first, last) == (None, None) or last == last_seq, "the oldest messages are deleted"
        messages += count
    for id_, chunk_count, count, last in await fetch(database_url, DOCUMENTS, user_id):
        assert chunk_count == count == last + 1, id_
        chunks += count
    return messages, chunks


@pytest.mark.parametrize("slice_count", range(13))
async def test_user_deletion_that_is_cut_off_leaves_right_counts_and_is_finished_by_a_repeat(
    server: Server,
    chat: Chat,
    other: Chat,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    slice_count: int,
) -> None:
    sessions = [await chat.start(new_messages(20)) for _ in range(3)]
    for message in (await chat.all(sessions[1]))[3:9:2]:
        await chat.delete(sessions[1], message.id)
    for _ in range(2):
        await create_document(chat, 20)
    kept_session, kept_document = (
        await other.start(new_messages(20)),
        await create_document(other, 20),
    )
    request = user_pb2.DeleteUserRequest(user_id=chat.user_id)
    with monkeypatch.context() as patch:
        cut_off_after(server, patch, slice_count)
        await assert_fails(chat.stub.DeleteUser(request), "DEADLINE_EXCEEDED")
    messages, chunks = await check_counts(database_url, chat.user_id)
    # 60 messages, three of them tombstones, and then 40 chunks; the last 7 are deleted at the end.
    assert messages <= max(60 - 7 * slice_count, 4)
    assert chunks == 40 - 7 * min(5, max(0, slice_count - 8))
    for session in sessions:
        listed = len(await chat.all(session))
        assert (await chat.get_session(session)).message_count == listed
    counts = await chat.stub.DeleteUser(request)
    assert (counts.session_count, counts.document_count) == (3, 2)
    assert (counts.message_count, counts.chunk_count) == (messages, chunks)
    assert await check_counts(database_url, chat.user_id) == (0, 0)
    assert await check_counts(database_url, other.user_id) == (20, 20)
    assert len(await other.all(kept_session)) == 20
    assert kept_document


async def test_session_deletion_that_is_cut_off_leaves_a_usable_session(
    server: Server, chat: Chat, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await chat.start(new_messages(20))
    with monkeypatch.context() as patch:
        cut_off_after(server, patch, 1)
        await assert_fails(chat.delete_session(session), "DEADLINE_EXCEEDED")
    assert await check_counts(database_url, chat.user_id) == (13, 0)
    assert [message.seq for message in await chat.all(session)] == list(range(8, 21))
    context = await chat.context(session)
    assert [message.seq for message in context.messages] == list(range(8, 21))
    assert (await chat.append(session, "more")).messages[0].seq == 21
    await chat.delete_session(session)
    await assert_fails(chat.get_session(session), "SESSION_NOT_FOUND")
    rows = await fetch(database_url, "SELECT FROM chat_messages WHERE session_id = $1", session)
    assert not rows


async def test_document_deletion_that_is_cut_off_leaves_a_document_that_can_grow(
    server: Server, chat: Chat, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = await create_document(chat, 20)
    request = document_pb2.DeleteDocumentRequest(user_id=chat.user_id, document_id=document)
    with monkeypatch.context() as patch:
        cut_off_after(server, patch, 1)
        await assert_fails(chat.stub.DeleteDocument(request), "DEADLINE_EXCEEDED")
    assert await check_counts(database_url, chat.user_id) == (0, 13)
    append = document_pb2.AppendDocumentChunksRequest(
        user_id=chat.user_id,
        document_id=document,
        first_index=13,
        chunks=[document_pb2.DocumentChunk(text="another chunk")],
    )
    assert (await chat.stub.AppendDocumentChunks(append)).document.chunk_count == 14
    await chat.stub.DeleteDocument(request)
    assert not await fetch(database_url, DOCUMENTS, chat.user_id)


async def test_large_texts_are_deleted_in_slices_of_bounded_bytes(
    server: Server, chat: Chat, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "BYTES_PER_DELETE", 2500)
    deleted: list[int] = []
    delete_next = Slices.delete_next

    async def counted_delete(self: Slices, connection: Any) -> int:
        deleted.append(await delete_next(self, connection))
        return deleted[-1]

    monkeypatch.setattr(Slices, "delete_next", counted_delete)
    texts = ["x" * size for size in (1000, 1000, 1000, 5000, 5000, 10, 10)]
    session = await chat.start([new_message(text) for text in texts])
    await chat.delete_session(session)
    assert deleted == [3, 1, 1]
    deleted.clear()
    request = document_pb2.CreateDocumentRequest(
        user_id=chat.user_id,
        document=document_pb2.Document(title="a document"),
        chunks=[document_pb2.DocumentChunk(text=text) for text in texts],
    )
    document = (await chat.stub.CreateDocument(request)).document.id
    await chat.stub.DeleteDocument(
        document_pb2.DeleteDocumentRequest(user_id=chat.user_id, document_id=document)
    )
    assert deleted == [3, 1, 3]


async def test_small_deletion_is_no_expensive_work(
    server: Server, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await chat.start(new_messages(7))
    document = await create_document(chat, 7)
    classes: list[object] = []
    write = server.database.write

    async def recorded_write(work: Any, **arguments: Any) -> Any:
        classes.append(arguments.get("work_class"))
        return await write(work, **arguments)

    monkeypatch.setattr(server.database, "write", recorded_write)
    await chat.delete_session(session)
    await chat.stub.DeleteDocument(
        document_pb2.DeleteDocumentRequest(user_id=chat.user_id, document_id=document)
    )
    await chat.stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id))
    assert classes == [None] * 3
