"""Reads everything of one user, a page at a time, in the order of keys."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import messages
from service.store.db.read_batching import Parameters
from service.store.rows import (
    DOCUMENT_COLUMNS,
    SESSION_COLUMNS,
    DocumentRow,
    MessageRow,
    SessionRow,
)
from service.store.tables import (
    SYSTEM_USER_ID,
    chat_sessions,
    document_chunks,
    documents,
)

_MESSAGES_AFTER = messages.after(Parameters.bound(messages.PAGE_PARAMETERS))


class ChunkWithVector(NamedTuple):
    """A chunk with the vector that the client gave, if any."""

    chunk_index: int
    text: str
    vector: bytes | None


async def list_sessions(
    connection: AsyncConnection, user_id: str, after: str | None, limit: int
) -> list[SessionRow]:
    """Read `limit` sessions after an id, in the order of ids: unlike the list's, it stays while one reads."""
    own = chat_sessions.c
    query = select(*SESSION_COLUMNS).where(
        own.user_id == user_id, own.id > (after or SYSTEM_USER_ID)
    )
    return [
        SessionRow._make(row)
        for row in await connection.execute(query.order_by(own.id).limit(limit))
    ]


async def list_messages(
    connection: AsyncConnection, user_id: str, session_id: str, seq: int, limit: int
) -> list[MessageRow]:
    """Read up to `limit` messages of a session after a seq, fewer when they are large; none when there are no more."""
    values = {"user_id": user_id, "session_id": session_id, "seq": seq, "limit": limit}
    return [MessageRow._make(row) for row in await connection.execute(_MESSAGES_AFTER, values)]


async def list_documents(
    connection: AsyncConnection, user_id: str, after: str | None, limit: int
) -> list[DocumentRow]:
    """Read `limit` of a user's own documents after an id, in the order of ids."""
    own = documents.c
    query = select(*DOCUMENT_COLUMNS).where(
        own.user_id == user_id, own.id > (after or SYSTEM_USER_ID)
    )
    return [
        DocumentRow._make(row)
        for row in await connection.execute(query.order_by(own.id).limit(limit))
    ]


async def list_chunks(
    connection: AsyncConnection, user_id: str, document_id: str, first: int, limit: int
) -> list[ChunkWithVector]:
    """Read up to `limit` chunks of a document from a place on."""
    own = document_chunks.c
    query = select(own.chunk_index, own.text, own.vector).where(
        own.user_id == user_id, own.document_id == document_id, own.chunk_index >= first
    )
    return [
        ChunkWithVector._make(row)
        for row in await connection.execute(query.order_by(own.chunk_index).limit(limit))
    ]
