"""Sessions."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import AlreadyExists, Conflict, InvalidArgument, NotFound
from service.store import session_tombstones
from service.store.bounded_reads import Page, fetch_bounded
from service.store.constraints import check_required
from service.store.db.db_errors import FOREIGN_KEY_VIOLATION, sqlstate
from service.store.db.replication import confirm_replication
from service.store.outbox import outbox
from service.store.rows import (
    SESSION_COLUMNS,
    SessionRow,
    check_etag,
    datetime_from_us,
    row_or_none,
    session_bytes,
    session_columns,
)
from service.store.tables import OutboxKind, SessionState, chat_messages, chat_sessions

MAX_SMALL_COPY, MAX_SMALL_COPY_BYTES = 200, 1024 * 1024
"""Messages and bytes that a fork copies as ordinary work, at most."""
_MAX_LOST_RACES = 5
"""Attempts to insert a session that concurrent writers may defeat."""

_session, _message = chat_sessions.c, chat_messages.c


class SessionCursor(NamedTuple):
    """Position in the list of a user's sessions: the last one of the page before."""

    updated_us: int
    id: str


async def create(connection: AsyncConnection, values: dict[str, Any]) -> SessionRow:
    """Insert a session, or return the session that an earlier attempt of the request created.

    Raises:
        NotFound: no user has the id `values["user_id"]`.
        AlreadyExists: another session of this user has the id (ID_TAKEN).
        Conflict: concurrent writers defeated too many attempts (CONTENTION).
    """
    check_required(chat_sessions, values, is_new=True)
    insertion = (
        pg_insert(chat_sessions).values(values).on_conflict_do_nothing().returning(*SESSION_COLUMNS)
    )
    for _ in range(_MAX_LOST_RACES):
        try:
            row = row_or_none(SessionRow, (await connection.execute(insertion)).one_or_none())
        except IntegrityError as error:
            if sqlstate(error) == FOREIGN_KEY_VIOLATION:
                raise NotFound.user(values["user_id"]) from None
            raise
        if row is not None:
            return row
        row = await find(connection, values["user_id"], values["id"])
        if row is not None:
            if row.fingerprint == values["fingerprint"]:
                await confirm_replication(connection)
                return row
            raise AlreadyExists(
                "another session has this id", reason="ID_TAKEN", session_id=values["id"]
            )
        # The session with this id was deleted since.
    raise Conflict(
        "other requests create and delete a session with this id; retry",
        reason="CONTENTION",
        retry_after=0.1,
        session_id=values["id"],
    )


async def find(
    connection: AsyncConnection, user_id: str, session_id: str, *, lock: bool = False
) -> SessionRow | None:
    """Read a session, or return None if this user has no such session.

    Args:
        connection: The connection, in a transaction.
        user_id: Owner of the session.
        session_id: The session.
        lock: Whether to lock the row until the end of the transaction.
    """
    query = sa.select(*SESSION_COLUMNS).where(
        _session.user_id == user_id, _session.id == session_id
    )
    return row_or_none(
        SessionRow,
        (await connection.execute(query.with_for_update() if lock else query)).one_or_none(),
    )


async def get(
    connection: AsyncConnection, user_id: str, session_id: str, *, lock: bool = False
) -> SessionRow:
    """Read a session; `lock` as in `find`.

    Raises:
        NotFound: this user has no such session.
    """
    row = await find(connection, user_id, session_id, lock=lock)
    if row is None:
        raise NotFound.session(session_id)
    return row


async def list_page(
    connection: AsyncConnection,
    user_id: str,
    state: SessionState | None,
    cursor: SessionCursor | None,
    limit: int,
    max_bytes: int,
) -> Page[SessionRow]:
    """Read up to `limit` of a user's sessions, or `max_bytes`, after `cursor`.

    The sessions with the newest activity come first. No index serves this order, because every
    append would have to maintain it: the statement sorts all sessions of the user. Only the rows of
    the page are then converted to their output form, which costs more per row than the sort.
    """
    query = sa.select(chat_sessions).where(_session.user_id == user_id)
    if state is not None:
        query = query.where(_session.state == state)
    if cursor is not None:
        position = sa.tuple_(
            sa.literal(datetime_from_us(cursor.updated_us)),
            sa.literal(cursor.id, _session.id.type),
        )
        query = query.where(sa.tuple_(_session.updated_at, _session.id) < position)

    def order(source: sa.FromClause) -> tuple[sa.ColumnElement[Any], ...]:
        return source.c.updated_at.desc(), source.c.id.desc()

    query = query.order_by(*order(chat_sessions)).limit(limit)
    return await fetch_bounded(
        connection, query, SessionRow._make, session_columns, session_bytes, order, max_bytes
    )


async def update(
    connection: AsyncConnection, user_id: str, session_id: str, values: dict[str, Any], etag: str
) -> SessionRow:
    """Write some columns of a session.

    Raises:
        NotFound: this user has no such session.
        Conflict: the session was updated since `etag` was read.
        InvalidArgument: `summarized_through_seq` is beyond `last_seq`.
    """
    check_required(chat_sessions, values)
    row = await get(connection, user_id, session_id, lock=True)
    check_etag(row, etag)
    if values.get("summarized_through_seq", 0) > row.last_seq:
        raise InvalidArgument.field(
            "session.summarized_through_seq", f"is beyond the session's last_seq, {row.last_seq}"
        )
    if not values:
        return row
    statement = (
        sa.update(chat_sessions)
        .where(_session.user_id == user_id, _session.id == session_id)
        .values(
            **values,
            revision=_session.revision + 1,
            updated_at=sa.func.greatest(_session.updated_at, sa.func.clock_timestamp()),
        )
        .returning(*SESSION_COLUMNS)
    )
    return SessionRow._make((await connection.execute(statement)).one())


async def delete(
    connection: AsyncConnection, user_id: str, session_id: str, *, search_enabled: bool = False
) -> bool:
    """Delete a session with its messages, and leave a tombstone.

    Returns:
        False if this user has no such session.
    """
    count = await session_tombstones.delete_sessions(connection, user_id, _session.id == session_id)
    if count:
        await outbox.enqueue(
            connection,
            OutboxKind.SESSION,
            user_id,
            session_id,
            wipe=True,
            search_enabled=search_enabled,
        )
    return count == 1


async def delete_messages(connection: AsyncConnection, user_id: str) -> int:
    """Delete all messages of a user; return their number without the tombstones among them."""
    deleted = (
        sa.delete(chat_messages)
        .where(_message.user_id == user_id)
        .returning(_message.deleted_at)
        .cte("deleted")
    )
    count = sa.select(sa.func.count()).select_from(deleted).where(deleted.c.deleted_at.is_(None))
    return await connection.scalar(count) or 0


async def is_large_copy(
    connection: AsyncConnection, user_id: str, source_id: str, through_seq: int
) -> bool:
    """Return whether a fork through `through_seq` copies many messages or many bytes."""
    rows = (
        sa.select(_message.size)
        .where(
            _message.user_id == user_id,
            _message.session_id == source_id,
            _message.seq <= through_seq,
        )
        .limit(MAX_SMALL_COPY + 1)
        .subquery("source")
    )
    size_bytes = sa.func.coalesce(sa.func.sum(rows.c.size), 0)
    is_large = (sa.func.count() > MAX_SMALL_COPY) | (size_bytes > MAX_SMALL_COPY_BYTES)
    return bool(await connection.scalar(sa.select(is_large).select_from(rows)))


async def fork(
    connection: AsyncConnection,
    user_id: str,
    source_id: str,
    through_seq: int,
    new_id: str,
    fingerprint: bytes,
    *,
    search_enabled: bool = False,
) -> SessionRow:
    """Copy a session's messages up to `through_seq`, with tombstones, into a new session.

    Returns:
        The new session, or the one that an earlier attempt of the same request created.

    Raises:
        NotFound: this user has no session `source_id`.
        InvalidArgument: `through_seq` is beyond `last_seq`.
        AlreadyExists: another session has the id `new_id` (ID_TAKEN).
    """
    earlier = await find(connection, user_id, new_id)
    if earlier is not None and earlier.fingerprint == fingerprint:
        await confirm_replication(connection)
        return earlier  # A replay succeeds even if the source has changed or was deleted since.
    # KEY SHARE prevents a concurrent delete of the source, and does not block appends.
    lock = (
        sa.select(_session.id)
        .where(_session.user_id == user_id, _session.id == source_id)
        .with_for_update(read=True, key_share=True)
    )
    if (await connection.execute(lock)).one_or_none() is None:
        raise NotFound.session(source_id)
    source = await get(connection, user_id, source_id)
    if through_seq > source.last_seq:
        raise InvalidArgument.field(
            "through_seq", f"is beyond the session's last_seq, {source.last_seq}"
        )
    forked = await create(
        connection, _fork_values(source, through_seq) | {"id": new_id, "fingerprint": fingerprint}
    )
    if forked.last_seq or not through_seq:
        return forked  # A concurrent attempt has copied the messages, or there are none to copy.
    await _copy_messages(connection, user_id, source_id, through_seq, new_id)
    await outbox.enqueue(
        connection,
        OutboxKind.SESSION,
        user_id,
        new_id,
        through=through_seq,
        search_enabled=search_enabled,
    )
    return await get(connection, user_id, new_id)


def _fork_values(source: SessionRow, through_seq: int) -> dict[str, Any]:
    """Return the values that a fork takes over; the summary only if it covers no more than that."""
    keeps_summary = source.summarized_through_seq <= through_seq
    return {
        "user_id": source.user_id,
        "title": source.title,
        "summary": source.summary if keeps_summary else "",
        "summarized_through_seq": source.summarized_through_seq if keeps_summary else 0,
        "metadata": None if source.metadata is None else json.loads(source.metadata),
        "forked_from_id": source.id,
        "forked_from_seq": through_seq,
    }


async def _copy_messages(
    connection: AsyncConnection, user_id: str, source_id: str, through_seq: int, new_id: str
) -> None:
    """Copy messages into a new session and set its `last_seq`, `message_count` and time."""
    columns = [column for column in _message if column.name != "session_id"]
    rows = sa.select(sa.literal(new_id, _message.session_id.type), *columns).where(
        _message.user_id == user_id, _message.session_id == source_id, _message.seq <= through_seq
    )
    copied = (
        sa.insert(chat_messages)
        .from_select(["session_id", *(column.name for column in columns)], rows)
        .returning(_message.deleted_at, _message.created_at)
        .cte("copied")
    )
    totals = sa.select(
        sa.func.count().filter(copied.c.deleted_at.is_(None)), sa.func.max(copied.c.created_at)
    )
    message_count, newest_at = (await connection.execute(totals)).one()
    await connection.execute(
        sa.update(chat_sessions)
        .where(_session.user_id == user_id, _session.id == new_id)
        .values(
            last_seq=through_seq,
            message_count=message_count,
            # The time of the next append must not be before that of the last copied message.
            updated_at=sa.func.greatest(_session.updated_at, newest_at),
        )
    )
