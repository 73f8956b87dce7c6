"""Everything of one user, as a stream that holds one page at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable

from chathistory.v1 import export_pb2

from service.rpc import convert, convert_documents
from service.rpc.call import Call
from service.rpc.handler import Handler
from service.store import export, users
from service.store.db.database import Database
from service.store.export import ChunkWithVector
from service.store.rows import DocumentRow, MessageRow, SessionRow

PAGE = 100
CHUNKS = 10
"""Chunks read at a time: each may have 256 KiB of text and as much of a vector."""

Item = export_pb2.ExportUserDataResponse


class Exports(Handler):
    """Hands a user's data out."""

    async def ExportUserData(
        self, request: export_pb2.ExportUserDataRequest, call: Call
    ) -> AsyncGenerator[Item]:
        """Send everything of one user, in order."""
        user_id = call.caller.resolve_user_id(request.user_id)
        async for item in items(self.database, user_id, self.call_timeout):
            yield item


async def items(database: Database, user_id: str, timeout: float) -> AsyncGenerator[Item]:
    """Read everything of one user, in order; each page has `timeout` seconds.

    Raises:
        NotFound: there is no such user, or it has been erased meanwhile.
    """
    loop = asyncio.get_running_loop()

    def deadline() -> float:
        return loop.time() + timeout

    yield Item(
        user=convert.user(
            await database.read(
                lambda connection: users.get(connection, user_id),
                owner_id=user_id,
                deadline=deadline(),
            )
        )
    )

    def sessions_after(last: str | None) -> Awaitable[list[SessionRow]]:
        return database.read(
            lambda connection: export.list_sessions(connection, user_id, last, PAGE),
            owner_id=user_id,
            deadline=deadline(),
        )

    def documents_after(last: str | None) -> Awaitable[list[DocumentRow]]:
        return database.read(
            lambda connection: export.list_documents(connection, user_id, last, PAGE),
            owner_id=user_id,
            deadline=deadline(),
        )

    last: str | None = None
    while page := await sessions_after(last):
        for session in page:
            yield Item(session=convert.session(session))
            async for item in _messages(database, session, timeout):
                yield item
        last = page[-1].id
    last = None
    while found := await documents_after(last):
        for document in found:
            yield Item(document=convert_documents.document(document))
            async for item in _chunks(database, document, timeout):
                yield item
        last = found[-1].id
    # An export that ends well is whole: it must not look so when the user was erased under it.
    await database.read(
        lambda connection: users.get(connection, user_id),
        owner_id=user_id,
        deadline=deadline(),
    )


async def _chunks(
    database: Database, document: DocumentRow, timeout: float
) -> AsyncGenerator[Item]:
    """Read the chunks that a document had when it was read."""
    loop = asyncio.get_running_loop()

    def chunks_from(first: int) -> Awaitable[list[ChunkWithVector]]:
        return database.read(
            lambda connection: export.list_chunks(
                connection, document.user_id, document.id, first, CHUNKS
            ),
            owner_id=document.user_id,
            deadline=loop.time() + timeout,
        )

    first = 0
    while page := await chunks_from(first):
        for row in page:
            if row.chunk_index >= document.chunk_count:
                return
            chunk = export_pb2.ExportedChunk(
                document_id=document.id, index=row.chunk_index, text=row.text
            )
            if row.vector is not None:
                chunk.vector.extend(convert_documents.unpacked(row.vector))
            yield Item(chunk=chunk)
        first = page[-1].chunk_index + 1


async def _messages(
    database: Database, session: SessionRow, timeout: float
) -> AsyncGenerator[Item]:
    """Read the messages that a session had when it was read."""
    loop = asyncio.get_running_loop()

    def messages_after(seq: int) -> Awaitable[list[MessageRow]]:
        return database.read(
            lambda connection: export.list_messages(
                connection, session.user_id, session.id, seq, PAGE
            ),
            owner_id=session.user_id,
            deadline=loop.time() + timeout,
        )

    seq = 0
    while page := await messages_after(seq):
        for row in page:
            if row.seq > session.last_seq:
                return
            yield Item(message=convert.message(row, session.id))
        seq = page[-1].seq
