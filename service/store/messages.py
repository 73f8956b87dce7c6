"""Messages: all operations except the append, which is in `store/append/`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import NotFound
from service.store import sessions
from service.store.constraints import check_required
from service.store.db.read_batching import BatchedRead, Parameters, ReadBatcher, Rows
from service.store.outbox import outbox
from service.store.rows import (
    MAX_PAGE_BYTES,
    MESSAGE_COLUMNS,
    MessageRow,
    check_etag,
    epoch_us,
    message_columns,
    row_or_none,
)
from service.store.tables import OutboxKind, chat_messages, chat_sessions
from service.store.token_estimate import estimate_tokens

MAX_SEQ = 2**63 - 1
"""Greater than the `seq` of any message."""

_session, _message = chat_sessions.c, chat_messages.c

PAGE_PARAMETERS = {
    "user_id": _message.user_id.type,
    "session_id": _message.session_id.type,
    "seq": sa.BigInteger(),
    "limit": sa.Integer(),
}
"""The parameters of a read of messages, with their types."""


def select_bounded(
    parameters: Parameters,
    match: sa.ColumnElement[bool],
    order: sa.ColumnElement[Any],
    limit: sa.ColumnElement[int] | None = None,
) -> sa.Select[Any]:
    """Select messages of one session up to a number of rows or MAX_PAGE_BYTES, but at least one.

    The sizes are summed before any text is read, so that a page never loads much more than it can
    send. Tombstones are skipped.

    Args:
        parameters: Has `user_id`, `session_id` and, without `limit`, the number of rows as `limit`.
        match: Condition on the messages.
        order: Order of the rows.
        limit: Number of rows.
    """
    running_bytes = sa.func.sum(_message.size).over(order_by=order, rows=(None, 0))
    rows = (
        sa.select(chat_messages, running_bytes.label("running_bytes"))
        .where(
            _message.user_id == parameters["user_id"],
            _message.session_id == parameters["session_id"],
            match,
            _message.deleted_at.is_(None),
        )
        .order_by(order)
        .limit(parameters["limit"] if limit is None else limit)
        .correlate(*parameters.tables)
        .subquery("m")
    )
    return sa.select(*message_columns(rows)).where(
        rows.c.running_bytes - rows.c.size < sa.literal_column(str(MAX_PAGE_BYTES))
    )


def select_after_seq(parameters: Parameters) -> sa.Select[Any]:
    """Select the messages after `seq`, oldest first."""
    return select_bounded(parameters, _message.seq > parameters["seq"], _message.seq.asc())


def _select_before_seq(parameters: Parameters) -> sa.Select[Any]:
    """Select the messages before `seq`, newest first."""
    return select_bounded(parameters, _message.seq < parameters["seq"], _message.seq.desc())


def _select_after_seq_in_same_session(parameters: Parameters) -> sa.Select[Any]:
    """Select as `select_after_seq`, but only from the session created at `session_created_us`."""
    is_same_session = (
        sa.select(_session.id)
        .where(
            _session.user_id == parameters["user_id"],
            _session.id == parameters["session_id"],
            epoch_us(_session.created_at) == parameters["session_created_us"],
        )
        .correlate(*parameters.tables)
        .exists()
    )
    match = sa.and_(_message.seq > parameters["seq"], is_same_session)
    return select_bounded(parameters, match, _message.seq.asc())


_AFTER_SEQ = BatchedRead(select_after_seq, PAGE_PARAMETERS)
_BEFORE_SEQ = BatchedRead(_select_before_seq, PAGE_PARAMETERS)
_AFTER_SEQ_IN_SAME_SESSION = BatchedRead(
    _select_after_seq_in_same_session, PAGE_PARAMETERS | {"session_created_us": sa.BigInteger()}
)


async def list_page(
    reads: ReadBatcher,
    user_id: str,
    session_id: str,
    cursor: int,
    limit: int,
    *,
    descending: bool = False,
    deadline: float,
) -> tuple[list[MessageRow], bool]:
    """Read up to `limit` messages after the seq `cursor` (before it if descending).

    Returns:
        The messages, fewer than `limit` when they are large, and whether there may be more.

    Raises:
        NotFound: this user has no such session.
    """
    read = _BEFORE_SEQ if descending else _AFTER_SEQ
    records = await reads.fetch(
        read, deadline, user_id=user_id, session_id=session_id, seq=cursor, limit=limit + 1
    )
    if not records:
        # Messages cannot exist without their session, so only an empty page needs this check.
        await reads.database.read(
            lambda connection: sessions.get(connection, user_id, session_id),
            owner_id=user_id,
            deadline=deadline,
        )
    return _split_page(records, limit)


async def list_since(
    reads: ReadBatcher,
    user_id: str,
    session_id: str,
    session_created_us: int,
    after_seq: int,
    limit: int,
    *,
    deadline: float,
) -> tuple[list[MessageRow], bool]:
    """Read as `list_page` does, but only from the session created at `session_created_us`.

    A session that was created later with the same id is another session.

    Raises:
        NotFound: that session was deleted.
    """
    records = await reads.fetch(
        _AFTER_SEQ_IN_SAME_SESSION,
        deadline,
        user_id=user_id,
        session_id=session_id,
        session_created_us=session_created_us,
        seq=after_seq,
        limit=limit + 1,
    )
    if not records:
        session = await reads.database.read(
            lambda connection: sessions.get(connection, user_id, session_id),
            owner_id=user_id,
            deadline=deadline,
        )
        if session.created_us != session_created_us:
            raise NotFound.session(session_id)
    return _split_page(records, limit)


def _split_page(records: Rows, limit: int) -> tuple[list[MessageRow], bool]:
    """Return the rows of a page and whether there may be more, of a read with `limit + 1`."""
    rows = [MessageRow._make(record) for record in records]
    has_more = len(rows) > limit or sum(row.size for row in rows) >= MAX_PAGE_BYTES
    return rows[:limit], has_more


async def get(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    message_id: str,
    *,
    lock: bool = False,
) -> MessageRow:
    """Read a message; with `lock` its row stays locked until the end of the transaction.

    Raises:
        NotFound: this user has no such session (SESSION_NOT_FOUND), or the session has no such
            message (MESSAGE_NOT_FOUND).
    """
    query = sa.select(*MESSAGE_COLUMNS).where(
        *_has_id(user_id, session_id, message_id), _message.deleted_at.is_(None)
    )
    row = row_or_none(
        MessageRow,
        (await connection.execute(query.with_for_update() if lock else query)).one_or_none(),
    )
    if row is None:
        await sessions.get(connection, user_id, session_id)
        raise NotFound.message_in(session_id, message_id)
    return row


def _has_id(user_id: str, session_id: str, message_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return _message.user_id == user_id, _message.session_id == session_id, _message.id == message_id


async def update(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    message_id: str,
    values: dict[str, Any],
    etag: str,
    measure_bytes: Callable[[MessageRow], Awaitable[int]],
    *,
    search_enabled: bool = False,
) -> MessageRow:
    """Write some columns of a message, and recompute its estimated tokens and its size.

    Args:
        connection: The connection, in a transaction.
        user_id: Owner of the session.
        session_id: Session of the message.
        message_id: The message.
        values: The columns to write; `parts` and `metadata` as JSON text.
        etag: The etag that the caller has read; empty for no check.
        measure_bytes: Checks the limits of the updated message, and returns its size in a reply.
        search_enabled: Whether to enqueue changed content for the search index.

    Raises:
        NotFound: as `get`.
        Conflict: the message was updated since `etag` was read.
    """
    row = await get(connection, user_id, session_id, message_id, lock=True)
    check_etag(row, etag)
    if not values:
        return row
    check_required(chat_messages, values)
    updated = row._replace(**values)
    json_values = {
        name: json.loads(values[name] or "null") for name in ("parts", "metadata") if name in values
    }
    statement = (
        sa.update(chat_messages)
        .where(*_has_id(user_id, session_id, message_id))
        .values(
            **values | json_values,
            token_estimate=estimate_tokens(updated.content, updated.parts),
            size=await measure_bytes(updated),
            revision=_message.revision + 1,
            updated_at=sa.func.greatest(_message.updated_at, sa.func.clock_timestamp()),
        )
        .returning(*MESSAGE_COLUMNS)
    )
    stored = MessageRow._make((await connection.execute(statement)).one())
    if search_enabled and stored.content != row.content:
        await outbox.enqueue(
            connection, OutboxKind.SESSION, user_id, session_id, since=row.seq, through=row.seq
        )
    return stored


async def delete(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    message_id: str,
    *,
    search_enabled: bool = False,
) -> bool:
    """Replace a message by a tombstone; return False if there is no such message.

    Raises:
        NotFound: this user has no such session.
    """
    # Lock the session first, as every other writer does. A delete of the whole session locks in
    # that order too, and would deadlock with a writer that locks the message first.
    await sessions.get(connection, user_id, session_id, lock=True)
    statement = (
        sa.update(chat_messages)
        .where(*_has_id(user_id, session_id, message_id), _message.deleted_at.is_(None))
        .values(
            content="",
            author="",
            parts=None,
            metadata=None,
            feedback_score=None,
            feedback_comment=None,
            token_count=None,
            token_estimate=0,
            size=0,
            deleted_at=sa.func.clock_timestamp(),
        )
    )
    seq = await connection.scalar(statement.returning(_message.seq))
    if seq is None:
        return False
    await connection.execute(
        sa.update(chat_sessions)
        .where(_session.user_id == user_id, _session.id == session_id)
        .values(message_count=sa.func.greatest(_session.message_count - 1, 0))
    )
    if search_enabled:
        await outbox.enqueue(
            connection, OutboxKind.SESSION, user_id, session_id, since=seq, through=seq
        )
    return True
