"""Users."""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import AlreadyExists, NotFound
from service.ids import SYSTEM_USER_ID
from service.store import documents, sessions
from service.store.db.db_errors import constraint
from service.store.outbox import outbox
from service.store.rows import USER_COLUMNS, UserRow, check_etag, row_or_none
from service.store.tables import chat_sessions, users

_CONFLICT_BY_CONSTRAINT = {
    "users_email_key": ("EMAIL_TAKEN", "another user has this e-mail address"),
    "users_external_id_key": ("EXTERNAL_ID_TAKEN", "another user has this external id"),
}


async def create(connection: AsyncConnection, values: dict[str, Any]) -> UserRow:
    """Insert a user, or return the user that an earlier attempt of the same request created.

    Raises:
        AlreadyExists: another user has the id, e-mail address or external id.
    """
    insertion = (
        insert(users)
        .values(values)
        .on_conflict_do_nothing(index_elements=["id"])
        .returning(*USER_COLUMNS)
    )
    try:
        row = row_or_none(UserRow, (await connection.execute(insertion)).one_or_none())
    except IntegrityError as error:
        raise _already_exists(error) from None
    if row is None:
        row = await _find(connection, users.c.id == values["id"])
    if row is None or row.fingerprint != values["fingerprint"]:
        raise AlreadyExists("another user has this id", reason="ID_TAKEN", user_id=values["id"])
    return row


def _already_exists(error: IntegrityError) -> Exception:
    """Return the error for a violated unique constraint, or `error` itself for any other one."""
    conflict = _CONFLICT_BY_CONSTRAINT.get(constraint(error) or "")
    if conflict is None:
        return error
    reason, message = conflict
    return AlreadyExists(message, reason=reason)


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
    match = (
        users.c.external_id == external_id
        if email is None
        else sa.func.lower(users.c.email) == sa.func.lower(email)
    )
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


async def list_page(connection: AsyncConnection, cursor: str | None, limit: int) -> list[UserRow]:
    """Read up to `limit` users after the id `cursor`, in the order of ids."""
    query = (
        sa.select(*USER_COLUMNS)
        .where(users.c.id > (cursor or SYSTEM_USER_ID))
        .order_by(users.c.id)
        .limit(limit)
    )
    return [UserRow._make(row) for row in await connection.execute(query)]


async def update(
    connection: AsyncConnection, user_id: str, values: dict[str, Any], etag: str
) -> UserRow:
    """Write some columns of a user.

    Raises:
        NotFound: no user has this id.
        Conflict: the user was updated since `etag` was read.
        AlreadyExists: another user has the e-mail address or external id.
    """
    row = await _find(connection, users.c.id == user_id, lock=True)
    if row is None:
        raise NotFound.user(user_id)
    check_etag(row, etag)
    if not values:
        return row
    statement = (
        sa.update(users)
        .where(users.c.id == user_id)
        .values(**values, revision=users.c.revision + 1, updated_at=sa.func.clock_timestamp())
        .returning(*USER_COLUMNS)
    )
    try:
        return UserRow._make((await connection.execute(statement)).one())
    except IntegrityError as error:
        raise _already_exists(error) from None


class DeletedCounts(NamedTuple):
    """Numbers of rows that were deleted with a user; messages without tombstones."""

    sessions: int
    messages: int
    documents: int
    chunks: int


async def delete(
    connection: AsyncConnection, user_id: str, *, search_enabled: bool = False
) -> DeletedCounts | None:
    """Delete a user with all data of that user; return None if no user has this id."""
    if await _find(connection, users.c.id == user_id, lock=True) is None:
        return None
    message_count = await sessions.delete_messages(connection, user_id)
    document_count, chunk_count = await documents.delete_all(connection, user_id)
    deleted_sessions = await connection.execute(
        sa.delete(chat_sessions).where(chat_sessions.c.user_id == user_id)
    )
    await connection.execute(sa.delete(users).where(users.c.id == user_id))
    await outbox.enqueue_user(connection, user_id, search_enabled=search_enabled)
    return DeletedCounts(deleted_sessions.rowcount, message_count, document_count, chunk_count)
