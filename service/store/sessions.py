"""Sessions."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import AlreadyExists, InvalidArgument, NotFound
from service.store.db.db_errors import sqlstate
from service.store.outbox import outbox
from service.store.rows import (
    SESSION_COLUMNS,
    SessionRow,
    check_etag,
    datetime_from_us,
    row_or_none,
    session_columns,
)
from service.store.tables import OutboxKind, SessionState, chat_messages, chat_sessions

MESSAGES_PER_DELETE = 10_000
"""Messages erased in one transaction. The cascade of a session of 500,000 held its lock for 0.76 s."""

_own = chat_sessions.c


async def create(connection: AsyncConnection, values: dict[str, Any]) -> SessionRow:
    """Insert a session, or return the one that an earlier try of the same request has made.

    Raises:
        NotFound: the user is not there.
        AlreadyExists: the id is another session's of this user (ID_TAKEN).
    """
    made = (
        pg_insert(chat_sessions).values(values).on_conflict_do_nothing().returning(*SESSION_COLUMNS)
    )
    try:
        row = row_or_none(SessionRow, (await connection.execute(made)).one_or_none())
    except IntegrityError as error:
        if sqlstate(error) == "23503":
            raise NotFound.user(values["user_id"]) from None
        raise
    if row is None:
        row = await find(connection, values["user_id"], values["id"])
    if row is None or row.fingerprint != values["fingerprint"]:
        raise AlreadyExists(
            "another session has this id", reason="ID_TAKEN", session_id=values["id"]
        )
    return row


async def find(
    connection: AsyncConnection, user_id: str, session_id: str, *, lock: bool = False
) -> SessionRow | None:
    """Read a session, or None; with `lock` nobody else changes it before this transaction ends."""
    query = sa.select(*SESSION_COLUMNS).where(_own.user_id == user_id, _own.id == session_id)
    return row_or_none(
        SessionRow,
        (await connection.execute(query.with_for_update() if lock else query)).one_or_none(),
    )


async def get(
    connection: AsyncConnection, user_id: str, session_id: str, *, lock: bool = False
) -> SessionRow:
    """Read a session.

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
    after: tuple[int, str] | None,
    limit: int,
) -> list[SessionRow]:
    """Read `limit` of a user's sessions, newest activity first, after a position (microseconds, id).

    No index serves the order, since an append would have to maintain it: the user's own rows are sorted. Only those of the page are
    then put into the form in which they leave, which costs more than the sort.
    """
    query = sa.select(chat_sessions).where(_own.user_id == user_id)
    if state is not None:
        query = query.where(_own.state == state)
    if after is not None:
        place = sa.tuple_(
            sa.literal(datetime_from_us(after[0])), sa.literal(after[1], _own.id.type)
        )
        query = query.where(sa.tuple_(_own.updated_at, _own.id) < place)
    rows = query.order_by(_own.updated_at.desc(), _own.id.desc()).limit(limit).subquery("s")
    ordered = sa.select(*session_columns(rows)).order_by(rows.c.updated_at.desc(), rows.c.id.desc())
    return [SessionRow._make(row) for row in await connection.execute(ordered)]


async def update(
    connection: AsyncConnection, user_id: str, session_id: str, values: dict[str, Any], etag: str
) -> SessionRow:
    """Write some columns of a session.

    Raises:
        NotFound: this user has no such session.
        Conflict: the etag is an older one's.
        InvalidArgument: `summarized_through_seq` lies beyond `last_seq`.
    """
    row = await get(connection, user_id, session_id, lock=True)
    check_etag(row, etag)
    if values.get("summarized_through_seq", 0) > row.last_seq:
        raise InvalidArgument.field(
            "session.summarized_through_seq", f"is beyond the session's last_seq, {row.last_seq}"
        )
    if not values:
        return row
    changed = (
        sa.update(chat_sessions)
        .where(_own.user_id == user_id, _own.id == session_id)
        .values(
            **values,
            revision=_own.revision + 1,
            updated_at=sa.func.greatest(_own.updated_at, sa.func.clock_timestamp()),
        )
        .returning(*SESSION_COLUMNS)
    )
    return SessionRow._make((await connection.execute(changed)).one())


async def delete(
    connection: AsyncConnection, user_id: str, session_id: str, *, search_enabled: bool = False
) -> bool:
    """Erase a session with its messages; False when there is none."""
    gone = await connection.execute(
        sa.delete(chat_sessions).where(_own.user_id == user_id, _own.id == session_id)
    )
    if gone.rowcount:
        await outbox.enqueue(
            connection,
            OutboxKind.SESSION,
            user_id,
            session_id,
            wipe=True,
            search_enabled=search_enabled,
        )
    return gone.rowcount == 1


async def delete_messages(
    connection: AsyncConnection,
    user_id: str,
    session_id: str | None = None,
    limit: int | None = None,
) -> int:
    """Erase messages of a user, or of one session, at most `limit` rows; return how many could still be read."""
    ours = chat_messages.c
    match = (
        [ours.user_id == user_id]
        if session_id is None
        else [ours.user_id == user_id, ours.session_id == session_id]
    )
    gone = sa.delete(chat_messages).where(*match)
    if limit is not None:
        key = (ours.session_id, ours.seq)
        gone = gone.where(
            sa.tuple_(*key).in_(sa.select(*key).where(*match).order_by(*key).limit(limit))
        )
    erased = gone.returning(ours.deleted_at).cte("erased")
    return (
        await connection.scalar(
            sa.select(sa.func.count()).select_from(erased).where(erased.c.deleted_at.is_(None))
        )
        or 0
    )


async def delete_slice(
    connection: AsyncConnection, user_id: str, session_id: str | None = None
) -> tuple[int, bool]:
    """Erase a slice of what is large; return how many messages could still be read, and whether more than a slice is left.

    A session that is being erased in slices loses its oldest messages first, and its counts follow.
    """
    ours = chat_messages.c
    match = (
        [ours.user_id == user_id]
        if session_id is None
        else [ours.user_id == user_id, ours.session_id == session_id]
    )
    large = await connection.scalar(
        sa.select(sa.literal(1))
        .select_from(chat_messages)
        .where(*match)
        .offset(MESSAGES_PER_DELETE)
        .limit(1)
    )
    if not large:
        return 0, False
    erased = await delete_messages(connection, user_id, session_id, MESSAGES_PER_DELETE)
    if session_id is not None:
        shrunk = sa.update(chat_sessions).where(_own.user_id == user_id, _own.id == session_id)
        await connection.execute(shrunk.values(message_count=_own.message_count - erased))
    return erased, True


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
    """Copy a session's messages up to `through_seq`, tombstones too, into a new session, or return what an earlier try has made.

    Raises:
        NotFound: this user has no such session.
        InvalidArgument: `through_seq` lies beyond `last_seq`.
        AlreadyExists: `new_id` is another session's (ID_TAKEN).
    """
    earlier = await find(connection, user_id, new_id)
    if earlier is not None and earlier.fingerprint == fingerprint:
        return earlier  # Whatever has become of the source since.
    # KEY SHARE keeps the source from being erased meanwhile, and lets appends pass.
    lock = (
        sa.select(_own.id)
        .where(_own.user_id == user_id, _own.id == source_id)
        .with_for_update(read=True, key_share=True)
    )
    if (await connection.execute(lock)).one_or_none() is None:
        raise NotFound.session(source_id)
    source = await get(connection, user_id, source_id)
    if through_seq > source.last_seq:
        raise InvalidArgument.field(
            "through_seq", f"is beyond the session's last_seq, {source.last_seq}"
        )
    summarized = source.summarized_through_seq <= through_seq
    values = {
        "user_id": user_id,
        "id": new_id,
        "title": source.title,
        "summary": source.summary if summarized else "",
        "summarized_through_seq": source.summarized_through_seq if summarized else 0,
        "metadata": None if source.metadata is None else json.loads(source.metadata),
        "forked_from_id": source_id,
        "forked_from_seq": through_seq,
        "fingerprint": fingerprint,
    }
    made = await create(connection, values)
    if made.last_seq or not through_seq:
        return made  # Another try of the same has copied meanwhile. Or there is nothing to copy.
    await _copy(connection, user_id, source_id, through_seq, new_id)
    await outbox.enqueue(
        connection,
        OutboxKind.SESSION,
        user_id,
        new_id,
        through=through_seq,
        search_enabled=search_enabled,
    )
    return await get(connection, user_id, new_id)


async def _copy(
    connection: AsyncConnection, user_id: str, source_id: str, through_seq: int, new_id: str
) -> None:
    ours = chat_messages.c
    columns = [column for column in ours if column.name != "session_id"]
    rows = sa.select(sa.literal(new_id, ours.session_id.type), *columns).where(
        ours.user_id == user_id, ours.session_id == source_id, ours.seq <= through_seq
    )
    copied = (
        sa.insert(chat_messages)
        .from_select(["session_id", *(column.name for column in columns)], rows)
        .returning(ours.deleted_at, ours.created_at)
        .cte("copied")
    )
    totals = sa.select(
        sa.func.count().filter(copied.c.deleted_at.is_(None)), sa.func.max(copied.c.created_at)
    )
    readable, newest = (await connection.execute(totals)).one()
    await connection.execute(
        sa.update(chat_sessions)
        .where(_own.user_id == user_id, _own.id == new_id)
        .values(
            last_seq=through_seq,
            message_count=readable,
            # The next append's time must not lie before the last copied message's.
            updated_at=sa.func.greatest(_own.updated_at, newest),
        )
    )
