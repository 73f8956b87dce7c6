"""Messages: everything but appending them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import NotFound
from service.store import sessions
from service.store.db.read_batching import BatchedRead, Parameters, ReadBatcher, Rows
from service.store.outbox import outbox
from service.store.rows import (
    MESSAGE_COLUMNS,
    MessageRow,
    check_etag,
    epoch_us,
    message_columns,
    row_or_none,
)
from service.store.tables import OutboxKind, chat_messages, chat_sessions

MAX_PAGE_BYTES = 3 * 1024 * 1024
"""Where a page stops, so that a reply stays below the 4 MiB that clients take by default."""
_BYTES_PER_TOKEN = 4
"""What common tokenizers make of English prose, on average."""

_own = chat_messages.c


def estimate_tokens(content: str, parts: str | None) -> int:
    """Guess how many tokens a message takes in a prompt, for clients that do not count."""
    return -(-(len(content.encode()) + len(parts or "")) // _BYTES_PER_TOKEN)


PAGE_PARAMETERS = {
    "user_id": _own.user_id.type,
    "session_id": _own.session_id.type,
    "seq": sa.BigInteger(),
    "limit": sa.Integer(),
}


def bounded(
    parameters: Parameters,
    match: sa.ColumnElement[bool],
    order: sa.ColumnElement[Any],
    limit: sa.ColumnElement[int] | None = None,
) -> sa.Select[Any]:
    """Select readable messages of one session up to `limit` rows or MAX_PAGE_BYTES, whichever comes first, at least one.

    The sizes are summed before the texts are read, so that a page never holds much more than it can send. Parameters: `user_id`,
    `session_id`, and `limit` unless given.
    """
    running = sa.func.sum(_own.size).over(order_by=order, rows=(None, 0))
    rows = (
        sa.select(chat_messages, running.label("running"))
        .where(
            _own.user_id == parameters["user_id"],
            _own.session_id == parameters["session_id"],
            match,
            _own.deleted_at.is_(None),
        )
        .order_by(order)
        .limit(parameters["limit"] if limit is None else limit)
        .correlate(*parameters.tables)
        .subquery("m")
    )
    return sa.select(*message_columns(rows)).where(
        rows.c.running - rows.c.size < sa.literal_column(str(MAX_PAGE_BYTES))
    )


def after(parameters: Parameters) -> sa.Select[Any]:
    """Select the messages after `seq`, oldest first."""
    return bounded(parameters, _own.seq > parameters["seq"], _own.seq.asc())


def _before(parameters: Parameters) -> sa.Select[Any]:
    """Select the messages before `seq`, newest first."""
    return bounded(parameters, _own.seq < parameters["seq"], _own.seq.desc())


def _after_in_same_session(parameters: Parameters) -> sa.Select[Any]:
    """Select as `after` does, but nothing once the session was deleted and created again with its id."""
    same_session = (
        sa.select(chat_sessions.c.id)
        .where(
            chat_sessions.c.user_id == parameters["user_id"],
            chat_sessions.c.id == parameters["session_id"],
            epoch_us(chat_sessions.c.created_at) == parameters["session_created_us"],
        )
        .correlate(*parameters.tables)
        .exists()
    )
    match = sa.and_(_own.seq > parameters["seq"], same_session)
    return bounded(parameters, match, _own.seq.asc())


_AFTER = BatchedRead(after, PAGE_PARAMETERS)
_BEFORE = BatchedRead(_before, PAGE_PARAMETERS)
_FOLLOWING = BatchedRead(
    _after_in_same_session, PAGE_PARAMETERS | {"session_created_us": sa.BigInteger()}
)
MAX_SEQ = 2**63 - 1
"""Beyond every `seq`."""


async def list_page(
    reads: ReadBatcher,
    user_id: str,
    session_id: str,
    start: int,
    limit: int,
    *,
    descending: bool = False,
    deadline: float,
) -> tuple[list[MessageRow], bool]:
    """Read up to `limit` messages after `start` (or before it, descending), fewer when they are large.

    Returns:
        The messages, and whether there may be more.

    Raises:
        NotFound: this user has no such session.
    """
    read = _BEFORE if descending else _AFTER
    records = await reads.fetch(
        read, deadline, user_id=user_id, session_id=session_id, seq=start, limit=limit + 1
    )
    if (
        not records
    ):  # Messages cannot be without their session, so only an empty page asks whether there is one.
        await reads.database.read(
            lambda connection: sessions.get(connection, user_id, session_id),
            owner_id=user_id,
            deadline=deadline,
        )
    return _cut(records, limit)


async def list_since(
    reads: ReadBatcher,
    user_id: str,
    session_id: str,
    session_created_us: int,
    start: int,
    limit: int,
    *,
    deadline: float,
) -> tuple[list[MessageRow], bool]:
    """Read as `page` does, from the session that was created at `session_created_us` and from no other that has come by its id since.

    Raises:
        NotFound: that session is gone.
    """
    records = await reads.fetch(
        _FOLLOWING,
        deadline,
        user_id=user_id,
        session_id=session_id,
        session_created_us=session_created_us,
        seq=start,
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
    return _cut(records, limit)


def _cut(records: Rows, limit: int) -> tuple[list[MessageRow], bool]:
    rows = [MessageRow._make(record) for record in records]
    more = len(rows) > limit or sum(row.size for row in rows) >= MAX_PAGE_BYTES
    return rows[:limit], more


async def get(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    message_id: str,
    *,
    lock: bool = False,
) -> MessageRow:
    """Read a message.

    Raises:
        NotFound: there is no such session of this user (SESSION_NOT_FOUND), or no such message in it (MESSAGE_NOT_FOUND).
    """
    query = sa.select(*MESSAGE_COLUMNS).where(
        *_is(user_id, session_id, message_id), _own.deleted_at.is_(None)
    )
    row = row_or_none(
        MessageRow,
        (await connection.execute(query.with_for_update() if lock else query)).one_or_none(),
    )
    if row is None:
        await sessions.get(connection, user_id, session_id)
        raise NotFound.message_in(session_id, message_id)
    return row


def _is(user_id: str, session_id: str, message_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return _own.user_id == user_id, _own.session_id == session_id, _own.id == message_id


async def update(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    message_id: str,
    values: dict[str, Any],
    etag: str,
    measure: Callable[[MessageRow], int],
    *,
    search_enabled: bool = False,
) -> MessageRow:
    """Write some columns of a message, `parts` and `metadata` given as JSON; its estimated tokens and (by `measure`) size follow.

    Raises:
        NotFound: as `get`.
        Conflict: the etag is an older one's.
    """
    row = await get(connection, user_id, session_id, message_id, lock=True)
    check_etag(row, etag)
    if not values:
        return row
    new = row._replace(**values)
    changed = (
        sa.update(chat_messages)
        .where(*_is(user_id, session_id, message_id))
        .values(
            **values
            | {
                name: json.loads(values[name] or "null")
                for name in ("parts", "metadata")
                if name in values
            },
            token_estimate=estimate_tokens(new.content, new.parts),
            size=measure(new),
            revision=_own.revision + 1,
            updated_at=sa.func.greatest(_own.updated_at, sa.func.clock_timestamp()),
        )
        .returning(*MESSAGE_COLUMNS)
    )
    result = MessageRow._make((await connection.execute(changed)).one())
    if search_enabled and result.content != row.content:
        await outbox.enqueue(
            connection, OutboxKind.SESSION, user_id, session_id, since=row.seq, through=row.seq
        )
    return result


async def delete(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    message_id: str,
    *,
    search_enabled: bool = False,
) -> bool:
    """Erase what a message says and leave its tombstone; False when there is nothing to erase.

    Raises:
        NotFound: there is no such session of this user.
    """
    # The session first, as every other writer takes it: whoever took the message first could meet an erasure of the session.
    await sessions.get(connection, user_id, session_id, lock=True)
    emptied = (
        sa.update(chat_messages)
        .where(*_is(user_id, session_id, message_id), _own.deleted_at.is_(None))
        .values(
            content="", author="", parts=None, metadata=None, feedback_score=None, feedback_comment=None,
            token_count=None, token_estimate=0, size=0, deleted_at=sa.func.clock_timestamp(),
        )
    )  # fmt: skip
    seq = await connection.scalar(emptied.returning(_own.seq))
    if seq is None:
        return False
    await connection.execute(
        sa.update(chat_sessions)
        .where(chat_sessions.c.user_id == user_id, chat_sessions.c.id == session_id)
        .values(message_count=chat_sessions.c.message_count - 1)
    )
    if search_enabled:
        await outbox.enqueue(
            connection, OutboxKind.SESSION, user_id, session_id, since=seq, through=seq
        )
    return True
