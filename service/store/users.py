"""Users."""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import AlreadyExists, Conflict, NotFound
from service.ids import SYSTEM_USER_ID, new_id
from service.store import documents, session_tombstones, sessions
from service.store.bounded_reads import Page, fetch_bounded
from service.store.constraints import check_required, reserve
from service.store.db.replication import confirm_replication
from service.store.outbox import outbox
from service.store.rows import (
    USER_COLUMNS,
    UserRow,
    check_etag,
    epoch_us,
    row_or_none,
    user_bytes,
    user_columns,
)
from service.store.tables import users

_MAX_LOST_RACES = 5
"""Attempts to write unique values that concurrent writers may defeat."""


class _UniqueValue(NamedTuple):
    """A column, other than the id, that identifies a user, and the error when it is taken."""

    column: str
    reason: str
    message: str

    def matches(self, value: Any) -> sa.ColumnElement[bool]:
        """Return the condition that a user has this value."""
        column: sa.ColumnElement[Any] = users.c[self.column]
        return sa.func.lower(column) == sa.func.lower(value) if self is _EMAIL else column == value


_EMAIL = _UniqueValue("email", "EMAIL_TAKEN", "another user has this e-mail address")
_EXTERNAL_ID = _UniqueValue("external_id", "EXTERNAL_ID_TAKEN", "another user has this external id")


async def create(connection: AsyncConnection, values: dict[str, Any]) -> UserRow:
    """Insert a user, or return the user that an earlier attempt of the same request created.

    Raises:
        AlreadyExists: another user has the id, e-mail address or external id.
        Conflict: concurrent writers defeated too many attempts (CONTENTION).
    """
    # Without an arbiter, a conflict with any unique constraint is no error. An error would write
    # the e-mail address or external id to PostgreSQL's log, and concurrent attempts of the same
    # request would conflict in an arbitrary one of the constraints.
    check_required(users, values, is_new=True)
    insertion = insert(users).values(values).on_conflict_do_nothing().returning(*USER_COLUMNS)
    for _ in range(_MAX_LOST_RACES):
        row = row_or_none(UserRow, (await connection.execute(insertion)).one_or_none())
        if row is not None:
            return row
        row = await _find(connection, users.c.id == values["id"])
        if row is not None and row.fingerprint == values["fingerprint"]:
            await confirm_replication(connection)
            return row
        if row is not None or values["id"] == SYSTEM_USER_ID:  # `_find` does not return that one.
            raise AlreadyExists("another user has this id", reason="ID_TAKEN", user_id=values["id"])
        for unique in (_EMAIL, _EXTERNAL_ID):
            await _check_holder(connection, unique, values.get(unique.column), values["id"])
        # The user with the same value was deleted or changed since.
    raise _contention()


async def _check_holder(
    connection: AsyncConnection, unique: _UniqueValue, value: Any, user_id: str
) -> bool:
    """Return whether the user itself has a unique value.

    Raises:
        AlreadyExists: another user has it.
    """
    if value is None:
        return False
    holder = await _find(connection, unique.matches(value))
    if holder is not None and holder.id != user_id:
        raise AlreadyExists(unique.message, reason=unique.reason)
    return holder is not None


async def _reserve(
    connection: AsyncConnection, unique: _UniqueValue, value: Any, user_id: str
) -> None:
    """Ensure that a user, whose row is locked, can take a unique value in this transaction.

    Raises:
        AlreadyExists: another user has the value.
        Conflict: concurrent writers defeated too many attempts (CONTENTION).
    """
    values = {"id": new_id(), "fingerprint": b"", unique.column: value}
    for _ in range(_MAX_LOST_RACES):
        if await reserve(connection, users, values):
            return
        if await _check_holder(connection, unique, value, user_id):
            return  # Only the case of the e-mail address changes.
    raise _contention()


def _contention() -> Conflict:
    return Conflict(
        "other requests write the same e-mail address or external id; retry",
        reason="CONTENTION",
        retry_after=0.1,
    )


async def get(connection: AsyncConnection, user_id: str) -> UserRow:
    """Read a user by id.

    Raises:
        NotFound: no user has this id.
    """
    row = await _find(connection, users.c.id == user_id)
    if row is None:
        raise NotFound.user(user_id)
    return row


async def get_by(
    connection: AsyncConnection, *, email: str | None = None, external_id: str | None = None
) -> UserRow:
    """Read a user by e-mail address (in any case) or by external id.

    Raises:
        NotFound: no user has this e-mail address or external id.
    """
    match = _EXTERNAL_ID.matches(external_id) if email is None else _EMAIL.matches(email)
    row = await _find(connection, match)
    if row is None:
        raise NotFound("user not found", reason="USER_NOT_FOUND")
    return row


async def _find(
    connection: AsyncConnection, match: sa.ColumnElement[bool], *, lock: bool = False
) -> UserRow | None:
    query = sa.select(*USER_COLUMNS).where(match, users.c.id != SYSTEM_USER_ID)
    return row_or_none(
        UserRow,
        (await connection.execute(query.with_for_update() if lock else query)).one_or_none(),
    )


async def list_page(
    connection: AsyncConnection, cursor: str | None, limit: int, max_bytes: int
) -> Page[UserRow]:
    """Read up to `limit` users, or `max_bytes`, after the id `cursor`, in the order of ids."""
    # The system's own user has the first id, the nil UUID.
    query = (
        sa.select(users)
        .where(users.c.id > (cursor or SYSTEM_USER_ID))
        .order_by(users.c.id)
        .limit(limit)
    )
    return await fetch_bounded(
        connection,
        query,
        UserRow._make,
        user_columns,
        user_bytes,
        lambda rows: (rows.c.id,),
        max_bytes,
    )


async def update(
    connection: AsyncConnection, user_id: str, values: dict[str, Any], etag: str
) -> UserRow:
    """Write some columns of a user.

    Raises:
        NotFound: no user has this id.
        Conflict: the user was updated since `etag` was read, or concurrent writers defeated too
            many attempts to take a unique value (CONTENTION).
        AlreadyExists: another user has the e-mail address or external id.
    """
    row = await _find(connection, users.c.id == user_id, lock=True)
    if row is None:
        raise NotFound.user(user_id)
    check_etag(row, etag)
    if not values:
        return row
    check_required(users, values)
    for unique in (_EMAIL, _EXTERNAL_ID):
        value = values.get(unique.column)
        if value is not None and value != getattr(row, unique.column):
            await _reserve(connection, unique, value, user_id)
    statement = (
        sa.update(users)
        .where(users.c.id == user_id)
        .values(**values, revision=users.c.revision + 1, updated_at=sa.func.clock_timestamp())
        .returning(*USER_COLUMNS)
    )
    return UserRow._make((await connection.execute(statement)).one())


async def set_up_us(connection: AsyncConnection) -> int:
    """Return when the database was set up, in microseconds since 1970; 0 if unknown.

    That is when the first migration created the system's own user.
    """
    query = sa.select(epoch_us(users.c.created_at)).where(users.c.id == SYSTEM_USER_ID)
    return await connection.scalar(query) or 0


class DeletedCounts(NamedTuple):
    """Numbers of rows that were deleted with a user; messages without tombstones."""

    sessions: int
    messages: int
    documents: int
    chunks: int


async def delete(
    connection: AsyncConnection, user_id: str, *, search_enabled: bool = False
) -> DeletedCounts | None:
    """Delete a user with all data of that user; return None if no user has this id.

    The tombstones of the user's sessions remain until they expire: a user with the same id may be
    created again.
    """
    if await _find(connection, users.c.id == user_id, lock=True) is None:
        return None
    message_count = await sessions.delete_messages(connection, user_id)
    document_count, chunk_count = await documents.delete_all(connection, user_id)
    session_count = await session_tombstones.delete_sessions(connection, user_id)
    await connection.execute(sa.delete(users).where(users.c.id == user_id))
    await outbox.enqueue_user(connection, user_id, search_enabled=search_enabled)
    return DeletedCounts(session_count, message_count, document_count, chunk_count)
