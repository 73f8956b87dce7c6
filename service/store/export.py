"""Reads all data of one user, one page at a time, in the order of the primary keys."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.ids import SYSTEM_USER_ID
from service.store.db.read_batching import Parameters
from service.store.messages import PAGE_PARAMETERS, select_after_seq
from service.store.rows import (
    DOCUMENT_COLUMNS,
    SESSION_COLUMNS,
    DocumentRow,
    MessageRow,
    SessionRow,
)
from service.store.tables import (
    chat_sessions,
    document_chunks,
    documents,
)

_session, _document, _chunk = chat_sessions.c, documents.c, document_chunks.c

_MESSAGES_AFTER_SEQ = select_after_seq(Parameters.bound(PAGE_PARAMETERS))


class ChunkWithVector(NamedTuple):
    """A chunk with the client's vector, if any."""

    chunk_index: int
    text: str
    vector: bytes | None


async def list_sessions(
    connection: AsyncConnection, user_id: str, cursor: str | None, limit: int
) -> list[SessionRow]:
    """Read up to `limit` sessions after the id `cursor`, in the order of ids.

    Unlike the order of ListSessions, this one does not change during the export.
    """
    query = (
        sa.select(*SESSION_COLUMNS)
        .where(_session.user_id == user_id, _session.id > (cursor or SYSTEM_USER_ID))
        .order_by(_session.id)
        .limit(limit)
    )
    return [SessionRow._make(row) for row in await connection.execute(query)]


async def list_messages(
    connection: AsyncConnection, user_id: str, session_id: str, cursor: int, limit: int
) -> list[MessageRow]:
    """Read up to `limit` messages of a session after the seq `cursor`.

    Fewer are returned when they are large, and none when there are no more.
    """
    values = {"user_id": user_id, "session_id": session_id, "seq": cursor, "limit": limit}
    rows = await connection.execute(_MESSAGES_AFTER_SEQ, values)
    return [MessageRow._make(row) for row in rows]


async def list_documents(
    connection: AsyncConnection, user_id: str, cursor: str | None, limit: int
) -> list[DocumentRow]:
    """Read up to `limit` of a user's own documents after the id `cursor`, in the order of ids."""
    query = (
        sa.select(*DOCUMENT_COLUMNS)
        .where(_document.user_id == user_id, _document.id > (cursor or SYSTEM_USER_ID))
        .order_by(_document.id)
        .limit(limit)
    )
    return [DocumentRow._make(row) for row in await connection.execute(query)]


async def list_chunks(
    connection: AsyncConnection, user_id: str, document_id: str, first_index: int, limit: int
) -> list[ChunkWithVector]:
    """Read up to `limit` chunks of a document from `first_index` on."""
    query = (
        sa.select(_chunk.chunk_index, _chunk.text, _chunk.vector)
        .where(
            _chunk.user_id == user_id,
            _chunk.document_id == document_id,
            _chunk.chunk_index >= first_index,
        )
        .order_by(_chunk.chunk_index)
        .limit(limit)
    )
    return [ChunkWithVector._make(row) for row in await connection.execute(query)]
