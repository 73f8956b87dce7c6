"""Reads of chunks are bounded by bytes, and all chunks of a request are written together."""

from __future__ import annotations

import asyncio

from chathistory.v1 import document_pb2

from service.server import Server
from service.store import document_chunks
from service.store.bounded_reads import Page
from service.store.document_chunks import FoundChunk
from tests.support.chat import Chat
from tests.support.failures import assert_fails
from tests.support.plans import recording

TEXT_BYTES = 200_000


async def create_document(chat: Chat, count: int) -> str:
    """Create a document of `count` large chunks, and return its id."""
    document_id = ""
    for first_index in range(0, count, 4):
        chunks = [
            document_pb2.DocumentChunk(text=f"{index}" + "x" * TEXT_BYTES)
            for index in range(first_index, min(count, first_index + 4))
        ]
        if not document_id:
            request = document_pb2.CreateDocumentRequest(
                user_id=chat.user_id, document=document_pb2.Document(title="t"), chunks=chunks
            )
            document_id = (await chat.stub.CreateDocument(request)).document.id
        else:
            await chat.stub.AppendDocumentChunks(
                document_pb2.AppendDocumentChunksRequest(
                    user_id=chat.user_id,
                    document_id=document_id,
                    first_index=first_index,
                    chunks=chunks,
                )
            )
    return document_id


async def test_found_chunks_are_in_order_and_within_a_bound_of_bytes(
    server: Server, chat: Chat, other: Chat
) -> None:
    document_id = await create_document(chat, 8)
    wanted = [7, 3, 99, 5, 0, 1]
    keys = [(chat.user_id, document_id, index) for index in wanted]

    async def find(owner_id: str, max_bytes: int) -> Page[FoundChunk]:
        return await server.database.read(
            lambda connection: document_chunks.find_chunks(connection, [owner_id], keys, max_bytes),
            owner_id=owner_id,
            deadline=asyncio.get_running_loop().time() + 30,
        )

    everything = await find(chat.user_id, 10 * TEXT_BYTES)
    assert [chunk.chunk_index for chunk in everything.rows] == [7, 3, 5, 0, 1]
    assert everything.rows[0].text.startswith("7")
    assert everything.rows[0].key == keys[0]
    assert everything.unread_bytes is None
    bounded = await find(chat.user_id, 2 * TEXT_BYTES + 5_000)
    assert [chunk.chunk_index for chunk in bounded.rows] == [7, 3]
    assert TEXT_BYTES < (bounded.unread_bytes or 0) < TEXT_BYTES + 5_000
    assert (await find(other.user_id, 10 * TEXT_BYTES)).rows == []


async def test_repeated_chunks_are_compared_in_the_database(server: Server, chat: Chat) -> None:
    document_id = await create_document(chat, 8)
    small = document_pb2.AppendDocumentChunksRequest(
        user_id=chat.user_id,
        document_id=document_id,
        first_index=0,
        chunks=[document_pb2.DocumentChunk(text="small")] * 8,
    )
    async with recording(server) as sent:
        await assert_fails(chat.stub.AppendDocumentChunks(small), "ID_TAKEN")
    reads = [
        statement.sql for statement in sent if "FROM chathistory.document_chunks" in statement.sql
    ]
    assert reads
    assert all("sha256" in sql for sql in reads)
    same = document_pb2.DocumentChunk(text="2" + "x" * TEXT_BYTES)
    small.first_index = 2
    del small.chunks[:]
    small.chunks.append(same)
    assert (await chat.stub.AppendDocumentChunks(small)).document.chunk_count == 8
    same.vector.extend([1.0, 2.0])
    del small.chunks[:]
    small.chunks.append(same)
    await assert_fails(chat.stub.AppendDocumentChunks(small), "ID_TAKEN")


async def test_chunks_of_a_request_are_inserted_by_one_statement(
    server: Server, chat: Chat
) -> None:
    """The parameters of 1,000 rows would be bound one by one on the event loop."""
    document_id = await create_document(chat, 1)
    chunks = [document_pb2.DocumentChunk(text=f"{index}") for index in range(1, 300)]
    chunks[7].vector.extend([0.5, 1.0])
    async with recording(server) as sent:
        await chat.stub.AppendDocumentChunks(
            document_pb2.AppendDocumentChunksRequest(
                user_id=chat.user_id, document_id=document_id, first_index=1, chunks=chunks
            )
        )
    inserts = [
        statement for statement in sent if "INTO chathistory.document_chunks" in statement.sql
    ]
    assert [len(statement.args) for statement in inserts] == [5]
    stored = await chat.stub.ListDocumentChunks(
        document_pb2.ListDocumentChunksRequest(
            user_id=chat.user_id, document_id=document_id, page_size=1000
        )
    )
    assert [(chunk.index, chunk.text) for chunk in stored.chunks[1:]] == [
        (index, f"{index}") for index in range(1, 300)
    ]
