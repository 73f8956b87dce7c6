"""Messages: reads and writes of one. Appends are in `store/append/`, lists in `message_pages`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import NotFound
from service.store import sessions
from service.store.constraints import check_required
from service.store.outbox import outbox
from service.store.rows import MESSAGE_COLUMNS, MessageRow, check_etag, row_or_none
from service.store.tables import OutboxKind, chat_messages, chat_sessions
from service.store.token_estimate import estimate_tokens

_session, _message = chat_sessions.c, chat_messages.c


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
