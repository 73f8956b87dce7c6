"""Chunks of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import AlreadyExists
from service.store.bounded_reads import Page, fetch_bounded
from service.store.constraints import check_required
from service.store.db.schema_names import in_schema, schema_of
from service.store.rows import DocumentRow, chunk_text_bytes, document_bytes, document_columns
from service.store.tables import document_chunks, documents

_document, _chunk = documents.c, document_chunks.c

ChunkKey = tuple[str, str, int]
"""A chunk: owner id, document id, chunk index."""

# One statement for all chunks: SQLAlchemy and the driver would take 20 ms of the event loop to bind
# the parameters of 1,000 rows.
_INSERT = """
INSERT INTO chathistory.document_chunks (user_id, document_id, chunk_index, text, vector)
SELECT $1::uuid, $2::uuid, $3::integer + n - 1, chunk_text, chunk_vector
FROM unnest($4::text[], $5::bytea[]) WITH ORDINALITY AS c (chunk_text, chunk_vector, n)
"""


class Chunk(NamedTuple):
    """A chunk to store."""

    text: str
    vector: bytes | None
    """The client's vector, if any: 32-bit floats, little-endian."""


class ChunkRow(NamedTuple):
    """A stored chunk."""

    chunk_index: int
    text: str


class FoundChunk(NamedTuple):
    """A chunk with its document."""

    document: DocumentRow
    chunk_index: int
    text: str

    @property
    def key(self) -> ChunkKey:
        """Its key."""
        return self.document.user_id, self.document.id, self.chunk_index


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
    texts = [chunk.text for chunk in chunks]
    row = {
        "user_id": user_id,
        "document_id": document_id,
        "chunk_index": first_index,
        "text": None if None in texts else "",
    }
    check_required(document_chunks, row, is_new=True)
    vectors = [chunk.vector for chunk in chunks]
    statement = in_schema(_INSERT, schema_of(connection))
    arguments = (user_id, document_id, first_index, texts, vectors)
    await connection.exec_driver_sql(statement, arguments)


async def check_stored_chunks(
    connection: AsyncConnection, document: DocumentRow, first_index: int, chunks: Sequence[Chunk]
) -> None:
    """Compare chunks, numbered from `first_index` on, with the stored ones of the same indexes.

    Raises:
        AlreadyExists: one of them differs (ID_TAKEN).
    """
    # Hashes are compared, since the stored chunks may be much larger than those of the request.
    query = sa.select(
        _chunk.chunk_index,
        sa.func.sha256(sa.func.convert_to(_chunk.text, sa.literal_column("'UTF8'"))),
        sa.func.sha256(_chunk.vector),
    ).where(
        _chunk.user_id == document.user_id,
        _chunk.document_id == document.id,
        _chunk.chunk_index.between(first_index, first_index + len(chunks) - 1),
    )
    for chunk_index, *hashes in await connection.execute(query):
        if _hashes(chunks[chunk_index - first_index]) != hashes:
            raise AlreadyExists(
                "another chunk is stored at this index",
                reason="ID_TAKEN",
                document_id=document.id,
                chunk_index=chunk_index,
            )


def _hashes(chunk: Chunk) -> list[bytes | None]:
    text_hash = hashlib.sha256(chunk.text.encode()).digest()
    return [text_hash, None if chunk.vector is None else hashlib.sha256(chunk.vector).digest()]


def _array(values: list[Any], column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    return sa.literal(values, sa.ARRAY(column.type))


async def find_chunks(
    connection: AsyncConnection,
    owner_ids: Sequence[str],
    keys: Sequence[ChunkKey],
    max_bytes: int,
) -> Page[FoundChunk]:
    """Read the document and the text of chunks in the order of `keys`, up to `max_bytes`.

    Chunks that do not exist, or belong to other owners than these, are left out.
    """
    wanted = (
        sa.func.unnest(
            _array([user_id for user_id, _, _ in keys], _document.user_id),
            _array([document_id for _, document_id, _ in keys], _document.id),
            _array([chunk_index for _, _, chunk_index in keys], _chunk.chunk_index),
        )
        .table_valued("user_id", "document_id", "chunk_index", with_ordinality="position")
        .render_derived("wanted")
    )
    key = wanted.c
    query = (
        sa.select(documents, _chunk.chunk_index, _chunk.text, key.position)
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
    return await fetch_bounded(
        connection,
        query,
        lambda values: FoundChunk(DocumentRow._make(values[:-2]), values[-2], values[-1]),
        lambda rows: (*document_columns(rows), rows.c.chunk_index, rows.c.text),
        lambda rows: document_bytes(rows) + chunk_text_bytes(rows),
        lambda rows: (rows.c.position,),
        max_bytes,
    )
