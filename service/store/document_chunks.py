"""Chunks of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import AlreadyExists
from service.store.constraints import check_required
from service.store.rows import DOCUMENT_COLUMNS, DocumentRow
from service.store.tables import document_chunks, documents

_document, _chunk = documents.c, document_chunks.c

ChunkKey = tuple[str, str, int]
"""A chunk: owner id, document id, chunk index."""


class Chunk(NamedTuple):
    """A chunk to store."""

    text: str
    vector: bytes | None
    """The client's vector, if any: 32-bit floats, little-endian."""


class ChunkRow(NamedTuple):
    """A stored chunk."""

    chunk_index: int
    text: str


async def insert_chunks(
    connection: AsyncConnection,
    user_id: str,
    document_id: str,
    first_index: int,
    chunks: Sequence[Chunk],
) -> None:
    """Insert the chunks of a document, which are numbered from `first_index` on."""
    if not chunks:
        return
    if first_index < 0:
        raise ValueError("the index of a chunk must not be negative")
    rows: list[dict[str, Any]] = [
        {
            "user_id": user_id,
            "document_id": document_id,
            "chunk_index": chunk_index,
            "text": chunk.text,
            "vector": chunk.vector,
        }
        for chunk_index, chunk in enumerate(chunks, first_index)
    ]
    for row in rows:
        check_required(document_chunks, row, is_new=True)
    await connection.execute(sa.insert(document_chunks), rows)


async def check_stored_chunks(
    connection: AsyncConnection, document: DocumentRow, first_index: int, chunks: Sequence[Chunk]
) -> None:
    """Compare chunks, numbered from `first_index` on, with the stored ones of the same indexes.

    Raises:
        AlreadyExists: one of them differs (ID_TAKEN).
    """
    query = sa.select(_chunk.chunk_index, _chunk.text, _chunk.vector).where(
        _chunk.user_id == document.user_id,
        _chunk.document_id == document.id,
        _chunk.chunk_index.between(first_index, first_index + len(chunks) - 1),
    )
    for chunk_index, text, vector in await connection.execute(query):
        if chunks[chunk_index - first_index] != (text, vector):
            raise AlreadyExists(
                "another chunk is stored at this index",
                reason="ID_TAKEN",
                document_id=document.id,
                chunk_index=chunk_index,
            )


def _array(values: list[Any], column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    return sa.literal(values, sa.ARRAY(column.type))


async def find_chunks(
    connection: AsyncConnection, owner_ids: Sequence[str], keys: Sequence[ChunkKey]
) -> dict[ChunkKey, tuple[DocumentRow, str]]:
    """Read the document and the text of chunks, by key.

    Chunks that do not exist, or belong to other owners than these, are left out.
    """
    wanted = (
        sa.func.unnest(
            _array([user_id for user_id, _, _ in keys], _document.user_id),
            _array([document_id for _, document_id, _ in keys], _document.id),
            _array([chunk_index for _, _, chunk_index in keys], _chunk.chunk_index),
        )
        .table_valued("user_id", "document_id", "chunk_index")
        .render_derived("wanted")
    )
    key = wanted.c
    query = (
        sa.select(*DOCUMENT_COLUMNS, _chunk.chunk_index, _chunk.text)
        .select_from(wanted)
        .join(documents, (_document.user_id == key.user_id) & (_document.id == key.document_id))
        .join(
            document_chunks,
            (_chunk.user_id == key.user_id)
            & (_chunk.document_id == key.document_id)
            & (_chunk.chunk_index == key.chunk_index),
        )
        .where(_document.user_id.in_(owner_ids), _chunk.user_id.in_(owner_ids))
    )
    chunks: dict[ChunkKey, tuple[DocumentRow, str]] = {}
    for *document_columns, chunk_index, text in await connection.execute(query):
        document = DocumentRow._make(document_columns)
        chunks[document.user_id, document.id, chunk_index] = (document, text)
    return chunks
