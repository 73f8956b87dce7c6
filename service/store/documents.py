"""Documents and their chunks.

Shared documents belong to the system's own user. Functions with a parameter `owner_ids` consider
only the documents of these users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import AlreadyExists, Conflict, InvalidArgument, NotFound
from service.ids import new_id
from service.store.bounded_reads import Page, fetch_bounded
from service.store.constraints import check_required, reserve
from service.store.db.db_errors import FOREIGN_KEY_VIOLATION, sqlstate
from service.store.db.replication import confirm_replication
from service.store.document_chunks import Chunk, ChunkRow, check_stored_chunks, insert_chunks
from service.store.outbox import outbox
from service.store.rows import (
    DOCUMENT_COLUMNS,
    DocumentRow,
    check_etag,
    chunk_text_bytes,
    datetime_from_us,
    document_bytes,
    document_columns,
    row_or_none,
)
from service.store.tables import DocumentStatus, OutboxKind, document_chunks, documents

CHUNKS_PER_DELETE = 5_000
"""Chunks deleted in one transaction."""
_MAX_LOST_RACES = 5
"""Attempts to insert a document that concurrent writers may defeat."""

_document, _chunk = documents.c, document_chunks.c


class DocumentCursor(NamedTuple):
    """Position in a list of documents: the last one of the page before."""

    created_us: int
    id: str
    user_id: str


async def create(
    connection: AsyncConnection,
    values: dict[str, Any],
    chunks: Sequence[Chunk],
    *,
    search_enabled: bool,
) -> DocumentRow:
    """Insert a document with its first chunks.

    Returns:
        The new document. If an earlier attempt of the same request created it, or if the owner has
        a document with the same content and source, that document.

    Raises:
        NotFound: no user has the id `values["user_id"]`.
        AlreadyExists: another document of this owner has the id (ID_TAKEN).
        Conflict: concurrent writers defeated too many attempts (CONTENTION).
    """
    user_id, document_id = values["user_id"], values["id"]
    row, is_new = await _insert(connection, values | {"chunk_count": len(chunks)})
    if not is_new:
        await confirm_replication(connection)
        return row
    await insert_chunks(connection, user_id, document_id, 0, chunks)
    await outbox.enqueue(
        connection,
        OutboxKind.DOCUMENT,
        user_id,
        document_id,
        through=max(0, len(chunks) - 1),
        search_enabled=search_enabled,
    )
    return row


async def _insert(connection: AsyncConnection, values: dict[str, Any]) -> tuple[DocumentRow, bool]:
    """Insert a document; return it or the stored one that answers the request, and which it is.

    Raises:
        NotFound, AlreadyExists: as `create`.
        Conflict: concurrent writers defeated too many attempts (CONTENTION).
    """
    check_required(documents, values, is_new=True)
    insertion = (
        pg_insert(documents).values(values).on_conflict_do_nothing().returning(*DOCUMENT_COLUMNS)
    )
    for _ in range(_MAX_LOST_RACES):
        try:
            row = row_or_none(DocumentRow, (await connection.execute(insertion)).one_or_none())
        except IntegrityError as error:
            if sqlstate(error) == FOREIGN_KEY_VIOLATION:
                raise NotFound.user(values["user_id"]) from None
            raise
        if row is not None:
            return row, True
        row = await _find_existing(connection, values)
        if row is not None:
            return row, False
        # The document that conflicted was deleted or changed since.
    raise _contention()


async def _find_existing(connection: AsyncConnection, values: dict[str, Any]) -> DocumentRow | None:
    """Return the stored document that answers a create request whose insert conflicted.

    It was created by the same request, or has the same content and source.

    Raises:
        AlreadyExists: another document of this owner has the id (ID_TAKEN).
    """
    user_id = values["user_id"]
    row = await _find(connection, _document.user_id == user_id, _document.id == values["id"])
    if row is not None and row.fingerprint == values["fingerprint"]:
        return row
    if values["content_sha256"] is not None:
        duplicate = await _find(
            connection,
            _document.user_id == user_id,
            _document.content_sha256 == values["content_sha256"],
            _document.source_uri == values["source_uri"],
        )
        if duplicate is not None:
            return duplicate
    if row is None:
        return None
    raise AlreadyExists("another document has this id", reason="ID_TAKEN", document_id=values["id"])


def _contention() -> Conflict:
    return Conflict(
        "other requests write documents with the same id or content; retry",
        reason="CONTENTION",
        retry_after=0.1,
    )


async def _find(
    connection: AsyncConnection, *match: sa.ColumnElement[bool], lock: bool = False
) -> DocumentRow | None:
    query = sa.select(*DOCUMENT_COLUMNS).where(*match)
    return row_or_none(
        DocumentRow,
        (await connection.execute(query.with_for_update() if lock else query)).one_or_none(),
    )


async def append_chunks(
    connection: AsyncConnection,
    owner_ids: Sequence[str],
    document_id: str,
    first_index: int,
    chunks: Sequence[Chunk],
    *,
    search_enabled: bool,
) -> DocumentRow:
    """Store chunks from `first_index` on; chunks that are stored already must be equal.

    Raises:
        NotFound: none of these owners has such a document.
        InvalidArgument: `first_index` is beyond the document's `chunk_count`.
        AlreadyExists: another chunk is stored at one of these indexes (ID_TAKEN).
    """
    row = await get(connection, owner_ids, document_id, lock=True)
    stored_count = row.chunk_count - first_index
    if stored_count < 0:
        raise InvalidArgument.field(
            "first_index", f"is beyond the document's chunk_count, {row.chunk_count}"
        )
    if stored_count > 0:
        await check_stored_chunks(connection, row, first_index, chunks)
    new_chunks = chunks[stored_count:]
    if not new_chunks:
        # Its lock on the row makes the commit wait for the standbys, as a write would.
        return row
    await insert_chunks(connection, row.user_id, document_id, row.chunk_count, new_chunks)
    statement = (
        sa.update(documents)
        .where(_document.user_id == row.user_id, _document.id == document_id)
        .values(
            chunk_count=row.chunk_count + len(new_chunks),
            status=DocumentStatus.PENDING,
            status_detail="",
            updated_at=sa.func.greatest(_document.updated_at, sa.func.clock_timestamp()),
        )
        .returning(*DOCUMENT_COLUMNS)
    )
    updated = DocumentRow._make((await connection.execute(statement)).one())
    await outbox.enqueue(
        connection,
        OutboxKind.DOCUMENT,
        row.user_id,
        document_id,
        since=row.chunk_count,
        through=updated.chunk_count - 1,
        search_enabled=search_enabled,
    )
    return updated


async def get(
    connection: AsyncConnection, owner_ids: Sequence[str], document_id: str, *, lock: bool = False
) -> DocumentRow:
    """Read the document of the first of these owners that has one with this id.

    With `lock` its row stays locked until the end of the transaction.

    Raises:
        NotFound: none of these owners has such a document.
    """
    for owner_id in owner_ids:
        row = await _find(
            connection, _document.user_id == owner_id, _document.id == document_id, lock=lock
        )
        if row is not None:
            return row
    raise NotFound.document(document_id)


async def list_page(
    connection: AsyncConnection,
    owner_ids: Sequence[str],
    filters: dict[str, Any],
    cursor: DocumentCursor | None,
    limit: int,
    max_bytes: int,
) -> Page[DocumentRow]:
    """Read up to `limit` documents of these owners, or `max_bytes`, after `cursor`, newest first.

    Args:
        connection: The connection, in a transaction.
        owner_ids: The owners.
        filters: The values that columns must have, by name of the column.
        cursor: The last document of the page before; None for the first page.
        limit: Maximum number of documents.
        max_bytes: Maximum bytes of the documents.
    """
    query = sa.select(documents).where(
        _document.user_id.in_(owner_ids),
        *(_document[name] == value for name, value in filters.items()),
    )
    if cursor is not None:
        position = sa.tuple_(
            sa.literal(datetime_from_us(cursor.created_us)),
            sa.literal(cursor.id, _document.id.type),
            sa.literal(cursor.user_id, _document.user_id.type),
        )
        query = query.where(
            sa.tuple_(_document.created_at, _document.id, _document.user_id) < position
        )

    def order(source: sa.FromClause) -> tuple[sa.ColumnElement[Any], ...]:
        return source.c.created_at.desc(), source.c.id.desc(), source.c.user_id.desc()

    query = query.order_by(*order(documents)).limit(limit)
    return await fetch_bounded(
        connection, query, DocumentRow._make, document_columns, document_bytes, order, max_bytes
    )


async def update(
    connection: AsyncConnection,
    owner_ids: Sequence[str],
    document_id: str,
    values: dict[str, Any],
    etag: str,
) -> DocumentRow:
    """Write some columns of a document.

    Raises:
        NotFound: none of these owners has such a document.
        Conflict: the document was updated since `etag` was read.
        AlreadyExists: another document has this content and source (ID_TAKEN).
    """
    row = await get(connection, owner_ids, document_id, lock=True)
    check_etag(row, etag)
    if not values:
        return row
    check_required(documents, values)
    if (
        row.content_sha256 is not None
        and values.get("source_uri", row.source_uri) != row.source_uri
    ):
        await _reserve_content(connection, row, values["source_uri"])
    statement = (
        sa.update(documents)
        .where(_document.user_id == row.user_id, _document.id == document_id)
        .values(
            **values,
            revision=_document.revision + 1,
            updated_at=sa.func.greatest(_document.updated_at, sa.func.clock_timestamp()),
        )
        .returning(*DOCUMENT_COLUMNS)
    )
    return DocumentRow._make((await connection.execute(statement)).one())


async def _reserve_content(connection: AsyncConnection, row: DocumentRow, source_uri: str) -> None:
    """Ensure that a document, whose row is locked, can get this source in this transaction.

    Raises:
        AlreadyExists: another document has this content and source (ID_TAKEN).
    """
    values = {
        "user_id": row.user_id,
        "id": new_id(),
        "content_sha256": row.content_sha256,
        "source_uri": source_uri,
        "fingerprint": b"",
    }
    if not await reserve(connection, documents, values):
        raise AlreadyExists(
            "another document has this content and source", reason="ID_TAKEN", document_id=row.id
        )


async def delete(
    connection: AsyncConnection, user_id: str, document_id: str, *, search_enabled: bool
) -> bool:
    """Delete a document with its chunks; return False if this user has no such document."""
    deleted = await connection.execute(
        sa.delete(documents).where(_document.user_id == user_id, _document.id == document_id)
    )
    if deleted.rowcount:
        await outbox.enqueue(
            connection,
            OutboxKind.DOCUMENT,
            user_id,
            document_id,
            wipe=True,
            search_enabled=search_enabled,
        )
    return deleted.rowcount == 1


async def delete_all(connection: AsyncConnection, user_id: str) -> tuple[int, int]:
    """Delete all documents of a user; return the numbers of deleted documents and chunks.

    It enqueues nothing: the caller enqueues the user.
    """
    deleted_chunks = await connection.execute(
        sa.delete(document_chunks).where(_chunk.user_id == user_id)
    )
    deleted_documents = await connection.execute(
        sa.delete(documents).where(_document.user_id == user_id)
    )
    return deleted_documents.rowcount, deleted_chunks.rowcount


async def list_chunks(
    connection: AsyncConnection,
    owner_ids: Sequence[str],
    document_id: str,
    first_index: int,
    limit: int,
    max_bytes: int,
) -> Page[ChunkRow]:
    """Read up to `limit` chunks, or `max_bytes`, from `first_index` on.

    Raises:
        NotFound: none of these owners has such a document.
    """
    document = await get(connection, owner_ids, document_id)
    query = (
        sa.select(_chunk.user_id, _chunk.document_id, _chunk.chunk_index, _chunk.text)
        .where(
            _chunk.user_id == document.user_id,
            _chunk.document_id == document_id,
            _chunk.chunk_index >= first_index,
        )
        .order_by(_chunk.chunk_index)
        .limit(limit)
    )
    return await fetch_bounded(
        connection,
        query,
        ChunkRow._make,
        lambda rows: (rows.c.chunk_index, rows.c.text),
        chunk_text_bytes,
        lambda rows: (rows.c.chunk_index,),
        max_bytes,
    )
