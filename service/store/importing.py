"""Writes exported data unchanged, with its `seq` numbers and times. Only operators can do this.

Every step accepts the rows of an earlier run, so that an interrupted import can be repeated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import AlreadyExists, NotFound
from service.store import sessions, users
from service.store.append.request import NewMessage
from service.store.constraints import check_required
from service.store.outbox import outbox
from service.store.rows import datetime_from_us
from service.store.tables import OutboxKind, Role, chat_messages, chat_sessions

GAP_FINGERPRINT = b""
"""Fingerprint of the tombstone at a seq for which the file has no message.

No message of a client has this fingerprint.
"""

_session, _message = chat_sessions.c, chat_messages.c


class ImportedMessage(NamedTuple):
    """A message with its seq and its times in microseconds since 1970."""

    seq: int
    created_us: int
    updated_us: int
    message: NewMessage


async def import_user(connection: AsyncConnection, values: dict[str, Any]) -> bool:
    """Insert a user unless one with this id exists; return whether it was inserted.

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
    """Insert a session unless the user has one with this id.

    Raises:
        NotFound: no user has the id `values["user_id"]`.
    """
    check_required(chat_sessions, values, is_new=True)
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
    """Insert messages, in the order of seq, except those stored already; return how many.

    Raises:
        AlreadyExists: another message has one of the seqs or ids, because the session was also
            written to by other means.
    """
    await sessions.get(connection, user_id, session_id, lock=True)
    first_seq, last_seq = messages[0].seq, messages[-1].seq
    if first_seq < 1:
        raise ValueError("the seq of a message must be positive")
    stored_ids = await _free_filled_gaps(connection, user_id, session_id, messages)
    for imported in messages:
        if stored_ids.get(imported.seq, imported.message.id) != imported.message.id:
            raise _seq_taken(session_id, imported.seq)
    new_messages = [imported for imported in messages if imported.seq not in stored_ids]
    if not new_messages:
        return 0
    rows = [_message_values(user_id, session_id, imported) for imported in new_messages]
    for row in rows:
        check_required(chat_messages, row, is_new=True)
    try:
        await connection.execute(sa.insert(chat_messages), rows)
    except IntegrityError:
        raise _seq_taken(session_id, first_seq) from None
    await connection.execute(
        sa.update(chat_sessions)
        .where(_session.user_id == user_id, _session.id == session_id)
        .values(
            last_seq=sa.func.greatest(_session.last_seq, last_seq),
            # A count that is wrong already must not violate the check of the table.
            message_count=sa.func.least(
                _session.message_count + len(new_messages),
                sa.func.greatest(_session.last_seq, last_seq),
            ),
        )
    )
    await outbox.enqueue(
        connection,
        OutboxKind.SESSION,
        user_id,
        session_id,
        since=first_seq,
        through=last_seq,
        search_enabled=search_enabled,
    )
    return len(new_messages)


async def _free_filled_gaps(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    messages: Sequence[ImportedMessage],
) -> dict[int, str]:
    """Delete the tombstones of gaps that these messages fill, and return the stored ids by seq.

    An earlier run, with a file that lacked some of these messages, took them for deleted ones.
    """
    # Not a range: the file may leave out any number of stored messages.
    seqs = [imported.seq for imported in messages]
    has_seq = (
        _message.user_id == user_id,
        _message.session_id == session_id,
        _message.seq == sa.any_(sa.literal(seqs, sa.ARRAY(_message.seq.type))),
    )
    query = sa.select(_message.seq, _message.id, _message.fingerprint).where(*has_seq)
    rows = (await connection.execute(query)).all()
    if any(row.fingerprint == GAP_FINGERPRINT for row in rows):
        await connection.execute(
            sa.delete(chat_messages).where(*has_seq, _message.fingerprint == GAP_FINGERPRINT)
        )
    return {row.seq: row.id for row in rows if row.fingerprint != GAP_FINGERPRINT}


def _seq_taken(session_id: str, seq: int) -> AlreadyExists:
    return AlreadyExists(
        f"session {session_id} holds another message at or after seq {seq}, which was not written"
        " by this import: import into another user, or delete the session first",
        session_id=session_id,
        seq=seq,
    )


def _message_values(user_id: str, session_id: str, imported: ImportedMessage) -> dict[str, Any]:
    values = imported.message._asdict()
    for name in ("parts", "metadata"):
        values[name] = json.loads(values[name] or "null")
    return values | {
        "user_id": user_id,
        "session_id": session_id,
        "seq": imported.seq,
        "created_at": datetime_from_us(imported.created_us),
        "updated_at": datetime_from_us(imported.updated_us),
    }


async def finish_session(
    connection: AsyncConnection,
    user_id: str,
    session_id: str,
    last_seq: int,
    updated_us: int | None,
) -> None:
    """Set the `last_seq` and time of a session, and add a tombstone for each seq without a message.

    Args:
        connection: The connection, in a transaction.
        user_id: Owner of the session.
        session_id: The session.
        last_seq: The `last_seq` to set.
        updated_us: Time of the last activity in microseconds since 1970; None keeps the stored one.
    """
    session = await sessions.get(connection, user_id, session_id, lock=True)
    if session.last_seq > last_seq:
        return  # An earlier run has finished the session, and messages were appended since.
    await _fill_gaps(connection, user_id, session_id, last_seq, session.created_us)
    newest_at = (
        sa.select(sa.func.max(_message.created_at))
        .where(_message.user_id == user_id, _message.session_id == session_id)
        .scalar_subquery()
    )
    updated_at = _session.updated_at if updated_us is None else datetime_from_us(updated_us)
    await connection.execute(
        sa.update(chat_sessions)
        .where(_session.user_id == user_id, _session.id == session_id)
        .values(
            last_seq=last_seq,
            # The time of the next append must not be before that of the last message, even if the
            # file has an earlier time.
            updated_at=sa.func.greatest(_session.created_at, updated_at, newest_at),
        )
    )


async def _fill_gaps(
    connection: AsyncConnection, user_id: str, session_id: str, last_seq: int, created_us: int
) -> None:
    """Insert a tombstone for each seq up to `last_seq` that has no message.

    A tombstone gets the time of the message before it, because times must follow seqs, or the time
    of the session's creation.
    """
    seqs = sa.select(sa.func.generate_series(1, last_seq).label("seq")).subquery()
    stored = sa.select(sa.literal(1)).where(
        _message.user_id == user_id,
        _message.session_id == session_id,
        _message.seq == seqs.c.seq,
    )
    time_before = (
        sa.select(_message.created_at)
        .where(
            _message.user_id == user_id,
            _message.session_id == session_id,
            _message.seq < seqs.c.seq,
        )
        .order_by(_message.seq.desc())
        .limit(1)
        .scalar_subquery()
    )
    time = sa.func.coalesce(time_before, datetime_from_us(created_us))
    columns = {
        "created_at": time,
        "updated_at": time,
        "user_id": sa.literal(user_id, _message.user_id.type),
        "session_id": sa.literal(session_id, _message.session_id.type),
        "seq": seqs.c.seq,
        "id": sa.func.gen_random_uuid(),
        "role": sa.literal(int(Role.USER)),
        "content": sa.literal(""),
        "token_estimate": sa.literal(0),
        "size": sa.literal(0),
        "fingerprint": sa.literal(GAP_FINGERPRINT),
        "deleted_at": sa.func.clock_timestamp(),
    }
    missing = sa.select(*columns.values()).where(~stored.exists())
    await connection.execute(sa.insert(chat_messages).from_select(list(columns), missing))
