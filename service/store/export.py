"""Reads all data of one user, one page at a time, in the order of the primary keys.

All pages are bounded by bytes, and are read by expensive work (`bounded_reads.read_held`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.bounded_reads import Page, fetch_bounded
from service.store.message_pages import LARGE_AFTER_SEQ, read_in_steps
from service.store.rows import (
    DocumentRow,
    MessageRow,
    SessionRow,
    chunk_bytes,
    document_bytes,
    document_columns,
    session_bytes,
    session_columns,
)
from service.store.tables import chat_sessions, document_chunks, documents

_session, _document, _chunk = chat_sessions.c, documents.c, document_chunks.c


class ChunkWithVector(NamedTuple):
    """A chunk with the client's vector, if any."""

    chunk_index: int
    text: str
    vector: bytes | None


def _after(column: sa.ColumnElement[str], cursor: str | None) -> sa.ColumnElement[bool]:
    # The first id may be the nil UUID, so that no id precedes all others.
    return sa.true() if cursor is None else column > cursor


def _by_id(rows: sa.FromClause) -> Sequence[sa.ColumnElement[Any]]:
    return (rows.c.id,)


async def list_sessions(
    connection: AsyncConnection, user_id: str, cursor: str | None, limit: int, max_bytes: int
) -> Page[SessionRow]:
    """Read up to `limit` sessions, or `max_bytes`, after the id `cursor`, in the order of ids.

    Unlike the order of ListSessions, this one does not change during the export.
    """
    query = (
        sa.select(chat_sessions)
        .where(_session.user_id == user_id, _after(_session.id, cursor))
        .order_by(_session.id)
        .limit(limit)
    )
    return await fetch_bounded(
        connection, query, SessionRow._make, session_columns, session_bytes, _by_id, max_bytes
    )


async def list_messages(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    cursor: int,
    limit: int,
    max_bytes: int,
) -> Page[MessageRow]:
    """Read up to `limit` messages of a session, or `max_bytes`, after the seq `cursor`."""
    ids = {"user_id": user_id, "session_id": session_id}
    return await read_in_steps(
        connection, LARGE_AFTER_SEQ, ids, cursor, limit, max_bytes, skips_gap=True
    )


async def list_documents(
    connection: AsyncConnection, user_id: str, cursor: str | None, limit: int, max_bytes: int
) -> Page[DocumentRow]:
    """Read up to `limit` of a user's own documents, or `max_bytes`, after the id `cursor`."""
    query = (
        sa.select(documents)
        .where(_document.user_id == user_id, _after(_document.id, cursor))
        .order_by(_document.id)
        .limit(limit)
    )
    return await fetch_bounded(
        connection, query, DocumentRow._make, document_columns, document_bytes, _by_id, max_bytes
    )


async def list_chunks(
    connection: AsyncConnection,
    user_id: str,
    document_id: str,
    first_index: int,
    limit: int,
    max_bytes: int,
) -> Page[ChunkWithVector]:
    """Read up to `limit` chunks of a document, or `max_bytes`, from `first_index` on."""
    query = (
        sa.select(document_chunks)
        .where(
            _chunk.user_id == user_id,
            _chunk.document_id == document_id,
            _chunk.chunk_index >= first_index,
        )
        .order_by(_chunk.chunk_index)
        .limit(limit)
    )
    return await fetch_bounded(
        connection,
        query,
        ChunkWithVector._make,
        lambda rows: (rows.c.chunk_index, rows.c.text, rows.c.vector),
        chunk_bytes,
        lambda rows: (rows.c.chunk_index,),
        max_bytes,
    )
