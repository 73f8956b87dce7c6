"""Writes what was exported, as it was: with its times and its places. An operator's way in, which no call of the API leads to.

Every step finds what an earlier run has left, so that an import that broke off is simply run again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import delete, func, insert, literal, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import AlreadyExists, NotFound
from service.store import sessions, users
from service.store.append.request import NewMessage
from service.store.outbox import outbox
from service.store.rows import datetime_from_us
from service.store.tables import OutboxKind, chat_messages, chat_sessions

GAP_FINGERPRINT = b""
"""Fingerprint of a tombstone that stands where a file has no message; no message of a client has it."""

_own, _message = chat_sessions.c, chat_messages.c


class ImportedMessage(NamedTuple):
    """A message with its place and times, in microseconds since 1970."""

    seq: int
    created_us: int
    updated_us: int
    message: NewMessage


async def import_user(connection: AsyncConnection, values: dict[str, Any]) -> bool:
    """Insert a user, unless there is one with this id; return whether it was inserted.

    Raises:
        AlreadyExists: another user has the e-mail address or external id.
    """
    try:
        await users.get(connection, values["id"])
    except NotFound:
        await users.create(connection, values)
        return True
    return False


async def import_session(connection: AsyncConnection, values: dict[str, Any]) -> None:
    """Insert a session, unless there is one with this id.

    Raises:
        NotFound: the user is not there.
    """
    await users.get(connection, values["user_id"])
    await connection.execute(pg_insert(chat_sessions).values(values).on_conflict_do_nothing())


async def import_messages(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    messages: Sequence[ImportedMessage],
    *,
    search_enabled: bool,
) -> int:
    """Insert messages at their places, those that are there already left out; return how many were inserted.

    Raises:
        AlreadyExists: another message has such a place or id: somebody has written to the session.
    """
    await sessions.get(connection, user_id, session_id, lock=True)
    first, last = messages[0].seq, messages[-1].seq
    place = (
        _message.user_id == user_id,
        _message.session_id == session_id,
        _message.seq.between(first, last),
    )
    rows = (
        await connection.execute(
            select(_message.seq, _message.id, _message.fingerprint).where(*place)
        )
    ).all()
    if any(row.fingerprint == GAP_FINGERPRINT for row in rows):
        # An earlier run had a file that ended here, and took what it lacked for deleted.
        filled = delete(chat_messages).where(*place, _message.fingerprint == GAP_FINGERPRINT)
        await connection.execute(filled.where(_message.seq.in_([old.seq for old in messages])))
    there = {row.seq: row.id for row in rows if row.fingerprint != GAP_FINGERPRINT}
    for old in messages:
        if there.get(old.seq, old.message.id) != old.message.id:
            raise _taken(session_id, old.seq)
    new = [old for old in messages if old.seq not in there]
    if not new:
        return 0
    try:
        await connection.execute(
            insert(chat_messages), [_values(user_id, session_id, old) for old in new]
        )
    except IntegrityError:
        raise _taken(session_id, first) from None
    await connection.execute(
        update(chat_sessions)
        .where(_own.user_id == user_id, _own.id == session_id)
        .values(
            last_seq=func.greatest(_own.last_seq, last), message_count=_own.message_count + len(new)
        )
    )
    await outbox.enqueue(
        connection,
        OutboxKind.SESSION,
        user_id,
        session_id,
        since=first,
        through=last,
        search_enabled=search_enabled,
    )
    return len(new)


def _taken(session_id: str, seq: int) -> AlreadyExists:
    return AlreadyExists(
        f"session {session_id} holds another message at or after seq {seq}: it was not made by this import",
        session_id=session_id,
        seq=seq,
    )


def _values(user_id: str, session_id: str, old: ImportedMessage) -> dict[str, Any]:
    values = old.message._asdict()
    for name in ("parts", "metadata"):
        values[name] = json.loads(values[name] or "null")
    return values | {
        "user_id": user_id,
        "session_id": session_id,
        "seq": old.seq,
        "created_at": datetime_from_us(old.created_us),
        "updated_at": datetime_from_us(old.updated_us),
    }


async def finish_session(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    last_seq: int,
    updated_us: int | None,
) -> None:
    """Give a session its last seq and time, and a tombstone to each place where a deleted message was."""
    row = await sessions.get(connection, user_id, session_id, lock=True)
    if row.last_seq > last_seq:
        return  # Somebody goes on writing to it: an earlier run has ended it.
    places = select(func.generate_series(1, last_seq).label("seq")).subquery()
    there = select(literal(1)).where(
        _message.user_id == user_id, _message.session_id == session_id, _message.seq == places.c.seq
    )
    # Times follow seq, also of what is gone.
    before = (
        select(_message.created_at)
        .where(
            _message.user_id == user_id,
            _message.session_id == session_id,
            _message.seq < places.c.seq,
        )
        .order_by(_message.seq.desc())
        .limit(1)
        .scalar_subquery()
    )
    at = func.coalesce(before, datetime_from_us(row.created_us))
    columns = {
        "created_at": at,
        "updated_at": at,
        "user_id": literal(user_id, _message.user_id.type),
        "session_id": literal(session_id, _message.session_id.type),
        "seq": places.c.seq,
        "id": func.gen_random_uuid(),
        "role": literal(1),
        "content": literal(""),
        "token_estimate": literal(0),
        "size": literal(0),
        "fingerprint": literal(GAP_FINGERPRINT),
        "deleted_at": func.clock_timestamp(),
    }
    missing = select(*columns.values()).where(~there.exists())
    await connection.execute(insert(chat_messages).from_select(list(columns), missing))
    newest = (
        select(func.max(_message.created_at))
        .where(_message.user_id == user_id, _message.session_id == session_id)
        .scalar_subquery()
    )
    updated_at = _own.updated_at if updated_us is None else datetime_from_us(updated_us)
    await connection.execute(
        update(chat_sessions)
        .where(_own.user_id == user_id, _own.id == session_id)
        # Whatever the file says: the next append's time must not lie before the last message's.
        .values(last_seq=last_seq, updated_at=func.greatest(_own.created_at, updated_at, newest))
    )
