"""Documents and their chunks. A shared document belongs to the system's own user; who may read it is said by `owners`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import AlreadyExists, InvalidArgument, NotFound
from service.store.db.db_errors import sqlstate
from service.store.outbox import outbox
from service.store.rows import (
    DOCUMENT_COLUMNS,
    DocumentRow,
    check_etag,
    datetime_from_us,
    row_or_none,
)
from service.store.tables import DocumentStatus, OutboxKind, document_chunks, documents

CHUNKS_PER_DELETE = 5_000
"""Chunks erased in one transaction."""
MAX_PAGE_BYTES = 3 * 1024 * 1024
"""Where a page of chunks stops."""

_own, _chunk = documents.c, document_chunks.c


def _array(column: sa.Column[Any]) -> sa.ARRAY[Any]:
    return sa.ARRAY(column.type)


class Chunk(NamedTuple):
    """A chunk to store; `vector` is what the client gave: 32-bit floats, little-endian."""

    text: str
    vector: bytes | None


class ChunkRow(NamedTuple):
    """A stored chunk."""

    chunk_index: int
    text: str


class DocumentCursor(NamedTuple):
    """Where a page of documents begins."""

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
    """Insert a document with its first chunks, or return the one that is there: by a retry, or with the same content.

    Raises:
        NotFound: the user is not there.
        AlreadyExists: the id is another document's of this owner (ID_TAKEN).
    """
    user_id, document_id = values["user_id"], values["id"]
    made = (
        pg_insert(documents).values(values | {"chunk_count": len(chunks)}).on_conflict_do_nothing()
    )
    try:
        row = row_or_none(
            DocumentRow, (await connection.execute(made.returning(*DOCUMENT_COLUMNS))).one_or_none()
        )
    except IntegrityError as error:
        if sqlstate(error) == "23503":
            raise NotFound.user(user_id) from None
        raise
    if row is None:
        return await _find_existing(connection, values)
    await _store(connection, user_id, document_id, 0, chunks)
    last = max(0, len(chunks) - 1)
    await outbox.enqueue(
        connection,
        OutboxKind.DOCUMENT,
        user_id,
        document_id,
        through=last,
        search_enabled=search_enabled,
    )
    return row


async def _find_existing(connection: AsyncConnection, values: dict[str, Any]) -> DocumentRow:
    user_id = values["user_id"]
    row = await _one(connection, _own.user_id == user_id, _own.id == values["id"])
    if row is not None and row.fingerprint == values["fingerprint"]:
        return row
    if values["content_sha256"] is not None:
        same = await _one(
            connection,
            _own.user_id == user_id,
            _own.content_sha256 == values["content_sha256"],
            _own.source_uri == values["source_uri"],
        )
        if same is not None:
            return same
    raise AlreadyExists("another document has this id", reason="ID_TAKEN", document_id=values["id"])


async def _one(
    connection: AsyncConnection, *match: sa.ColumnElement[bool], lock: bool = False
) -> DocumentRow | None:
    query = sa.select(*DOCUMENT_COLUMNS).where(*match)
    return row_or_none(
        DocumentRow,
        (await connection.execute(query.with_for_update() if lock else query)).one_or_none(),
    )


async def _store(
    connection: AsyncConnection, user_id: str, document_id: str, first: int, chunks: Sequence[Chunk]
) -> None:
    if chunks:
        rows: list[dict[str, Any]] = [
            {
                "user_id": user_id,
                "document_id": document_id,
                "chunk_index": n,
                "text": chunk.text,
                "vector": chunk.vector,
            }
            for n, chunk in enumerate(chunks, first)
        ]
        await connection.execute(sa.insert(document_chunks), rows)


async def append_chunks(
    connection: AsyncConnection,
    owners: Sequence[str],
    document_id: str,
    first: int,
    chunks: Sequence[Chunk],
    *,
    search_enabled: bool,
) -> DocumentRow:
    """Store chunks from a place on; those that are there already must be the same.

    Raises:
        NotFound: there is no such document.
        InvalidArgument: they would leave a gap.
        AlreadyExists: another chunk is stored at such a place (ID_TAKEN).
    """
    row = await get(connection, owners, document_id, lock=True)
    there = row.chunk_count - first
    if there < 0:
        raise InvalidArgument.field(
            "first_index", f"is beyond the document's chunk_count, {row.chunk_count}"
        )
    match = (_chunk.user_id == row.user_id, _chunk.document_id == document_id)
    if there > 0:
        stored = sa.select(_chunk.chunk_index, _chunk.text, _chunk.vector).where(
            *match, _chunk.chunk_index.between(first, first + len(chunks) - 1)
        )
        for index, text, vector in await connection.execute(stored):
            if chunks[index - first] != (text, vector):
                raise AlreadyExists(
                    "another chunk is stored at this place",
                    reason="ID_TAKEN",
                    document_id=document_id,
                    chunk_index=index,
                )
    new = chunks[there:]
    if not new:
        return row
    await _store(connection, row.user_id, document_id, row.chunk_count, new)
    grown = (
        sa.update(documents)
        .where(_own.user_id == row.user_id, _own.id == document_id)
        .values(
            chunk_count=row.chunk_count + len(new),
            status=DocumentStatus.PENDING,
            status_detail="",
            updated_at=sa.func.greatest(_own.updated_at, sa.func.clock_timestamp()),
        )
        .returning(*DOCUMENT_COLUMNS)
    )
    result = DocumentRow._make((await connection.execute(grown)).one())
    await outbox.enqueue(
        connection,
        OutboxKind.DOCUMENT,
        row.user_id,
        document_id,
        since=row.chunk_count,
        through=result.chunk_count - 1,
        search_enabled=search_enabled,
    )
    return result


async def get(
    connection: AsyncConnection, owners: Sequence[str], document_id: str, *, lock: bool = False
) -> DocumentRow:
    """Read a document of the first of these owners who has it.

    Raises:
        NotFound: none of them has.
    """
    for owner in owners:
        row = await _one(connection, _own.user_id == owner, _own.id == document_id, lock=lock)
        if row is not None:
            return row
    raise NotFound.document(document_id)


async def list_page(
    connection: AsyncConnection,
    owners: Sequence[str],
    filters: dict[str, Any],
    after: DocumentCursor | None,
    limit: int,
) -> list[DocumentRow]:
    """Read `limit` documents of these owners, newest first, after a place."""
    query = sa.select(*DOCUMENT_COLUMNS).where(
        _own.user_id.in_(owners), *(_own[name] == is_ for name, is_ in filters.items())
    )
    if after is not None:
        place = (
            sa.literal(datetime_from_us(after.created_us)),
            sa.literal(after.id, _own.id.type),
            sa.literal(after.user_id, _own.user_id.type),
        )
        query = query.where(sa.tuple_(_own.created_at, _own.id, _own.user_id) < sa.tuple_(*place))
    query = query.order_by(_own.created_at.desc(), _own.id.desc(), _own.user_id.desc()).limit(limit)
    return [DocumentRow._make(row) for row in await connection.execute(query)]


async def update(
    connection: AsyncConnection,
    owners: Sequence[str],
    document_id: str,
    values: dict[str, Any],
    etag: str,
) -> DocumentRow:
    """Write some columns of a document.

    Raises:
        NotFound: there is no such document.
        Conflict: the etag is an older one's.
        AlreadyExists: another document has this content and source (ID_TAKEN).
    """
    row = await get(connection, owners, document_id, lock=True)
    check_etag(row, etag)
    if not values:
        return row
    changed = (
        sa.update(documents)
        .where(_own.user_id == row.user_id, _own.id == document_id)
        .values(
            **values,
            revision=_own.revision + 1,
            updated_at=sa.func.greatest(_own.updated_at, sa.func.clock_timestamp()),
        )
        .returning(*DOCUMENT_COLUMNS)
    )
    try:
        return DocumentRow._make((await connection.execute(changed)).one())
    except IntegrityError as error:
        if sqlstate(error) == "23505":
            raise AlreadyExists(
                "another document has this content and source",
                reason="ID_TAKEN",
                document_id=document_id,
            ) from None
        raise


async def delete_slice(
    connection: AsyncConnection, user_id: str, document_id: str | None = None
) -> tuple[int, bool]:
    """Erase a slice of what is large, of one document or of all the user's; return how many chunks, and whether to go on."""
    match = [_chunk.user_id == user_id] + (
        [_chunk.document_id == document_id] if document_id else []
    )
    large = await connection.scalar(
        sa.select(sa.literal(1))
        .select_from(document_chunks)
        .where(*match)
        .offset(CHUNKS_PER_DELETE)
        .limit(1)
    )
    if not large:
        return 0, False
    key = (_chunk.document_id, _chunk.chunk_index)
    slice_ = sa.select(*key).where(*match).order_by(*key).limit(CHUNKS_PER_DELETE)
    gone = await connection.execute(
        sa.delete(document_chunks).where(_chunk.user_id == user_id, sa.tuple_(*key).in_(slice_))
    )
    return gone.rowcount, True


async def delete(
    connection: AsyncConnection, user_id: str, document_id: str, *, search_enabled: bool
) -> bool:
    """Erase a document with its chunks; False when there is none."""
    gone = await connection.execute(
        sa.delete(documents).where(_own.user_id == user_id, _own.id == document_id)
    )
    if gone.rowcount:
        await outbox.enqueue(
            connection,
            OutboxKind.DOCUMENT,
            user_id,
            document_id,
            wipe=True,
            search_enabled=search_enabled,
        )
    return gone.rowcount == 1


async def delete_all(connection: AsyncConnection, user_id: str) -> tuple[int, int]:
    """Erase all documents of a user; return how many documents and chunks went."""
    chunks = await connection.execute(sa.delete(document_chunks).where(_chunk.user_id == user_id))
    gone = await connection.execute(sa.delete(documents).where(_own.user_id == user_id))
    return gone.rowcount, chunks.rowcount


async def list_chunks(
    connection: AsyncConnection, owners: Sequence[str], document_id: str, first: int, limit: int
) -> tuple[list[ChunkRow], bool]:
    """Read up to `limit` chunks from a place on, fewer when they are large; and whether there may be more.

    Raises:
        NotFound: there is no such document.
    """
    row = await get(connection, owners, document_id)
    # The sizes are summed before the texts are read.
    size = sa.func.octet_length(_chunk.text)
    running = sa.func.sum(size).over(order_by=_chunk.chunk_index, rows=(None, 0))
    rows = (
        sa.select(
            _chunk.user_id,
            _chunk.document_id,
            _chunk.chunk_index,
            _chunk.text,
            (running - size).label("before"),
        )
        .where(
            _chunk.user_id == row.user_id,
            _chunk.document_id == document_id,
            _chunk.chunk_index >= first,
        )
        .order_by(_chunk.chunk_index)
        .limit(limit)
        .subquery()
    )
    query = (
        sa.select(rows.c.chunk_index, rows.c.text)
        .where(rows.c.before < MAX_PAGE_BYTES)
        .order_by(rows.c.chunk_index)
    )
    page = [ChunkRow._make(found) for found in await connection.execute(query)]
    return page, bool(page) and page[-1].chunk_index + 1 < row.chunk_count


async def find_chunks(
    connection: AsyncConnection, owners: Sequence[str], keys: Sequence[tuple[str, str, int]]
) -> dict[tuple[str, str, int], tuple[DocumentRow, str]]:
    """Read chunks by (owner, document id, index) with their documents; those that are gone, or not these owners', are left out."""
    wanted = (
        sa.func.unnest(
            sa.literal([key[0] for key in keys], _array(_own.user_id)),
            sa.literal([key[1] for key in keys], _array(_own.id)),
            sa.literal([key[2] for key in keys], _array(_chunk.chunk_index)),
        )
        .table_valued("user_id", "id", "chunk_index")
        .render_derived("w")
    )
    w = wanted.c
    query = (
        sa.select(*DOCUMENT_COLUMNS, _chunk.chunk_index, _chunk.text)
        .select_from(wanted)
        .join(documents, (_own.user_id == w.user_id) & (_own.id == w.id))
        .join(
            document_chunks,
            (_chunk.user_id == w.user_id)
            & (_chunk.document_id == w.id)
            & (_chunk.chunk_index == w.chunk_index),
        )
        .where(_own.user_id.in_(owners), _chunk.user_id.in_(owners))
    )
    rows = [
        (DocumentRow._make(row[:-2]), row[-2], row[-1]) for row in await connection.execute(query)
    ]
    return {(row.user_id, row.id, index): (row, text) for row, index, text in rows}
