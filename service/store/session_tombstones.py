"""Tombstones of deleted sessions, which refuse late retries of the appends that started them.

An append without a session id starts a session whose id is derived from the user and the first
message (UUID version 5). If the session is deleted before a late retry of that append arrives, the
retry would start it again, with the messages that were erased. The transaction that deletes a
session therefore inserts a tombstone, if the id can be a derived one, and only appends without a
session id are refused by it. A request that names the session may create it again.

The append statement (append/sql.py) checks for a tombstone in its snapshot, and inserts a row of
its own for each session id that it has derived. That row conflicts with a tombstone that was
committed after the snapshot, which rolls the statement back. Its `deleted_at` is -infinity: once
the statement is committed, the row has no meaning.

A tombstone holds for `RETENTION`. Expired rows are purged in slices after writes, and never by a
timer, which would keep a suspended database awake.
"""

from __future__ import annotations

import asyncio

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import ServiceError
from service.store.db.database import NO_OWNER, Database
from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.hot_pool import Record, Statement
from service.store.tables import chat_sessions, session_tombstones

RETENTION = "24 hours"
"""Time for which a tombstone refuses retries."""
PURGE_INTERVAL_S = 60.0
"""Seconds between two purges of one process, at least."""
ROWS_PER_PURGE = 1_000
"""Rows deleted in one transaction."""
PURGE_TIMEOUT_S = 10.0
"""Seconds that one slice may take."""

_log = structlog.get_logger(__name__)
_session, _tombstone = chat_sessions.c, session_tombstones.c

_FIND = Statement.from_text(f"""
SELECT t.user_id::text, t.session_id::text,
       EXISTS (SELECT FROM chathistory.users AS u WHERE u.id = t.user_id) AS has_user
FROM unnest($1::uuid[], $2::uuid[]) AS w (user_id, session_id)
JOIN chathistory.session_tombstones AS t ON t.user_id = w.user_id AND t.session_id = w.session_id
WHERE t.deleted_at > clock_timestamp() - interval '{RETENTION}'
""")  # noqa: S608 - only a constant is inserted


async def find_tombstones(
    database: Database, keys: list[tuple[str, str]]
) -> dict[tuple[str, str], Record]:
    """Return the tombstones that refuse appends to these sessions, and whether the user exists.

    Args:
        database: The database.
        keys: Ids of users and sessions.
    """
    if not keys:
        return {}
    user_ids, session_ids = map(list, zip(*keys, strict=True))
    rows = await database.fetch_once(_FIND, user_ids, session_ids, is_reading=True)
    return {(row["user_id"], row["session_id"]): row for row in rows}


async def delete_sessions(
    connection: AsyncConnection, user_id: str, *match: sa.ColumnElement[bool]
) -> int:
    """Delete sessions of a user with their messages, and leave tombstones; return their number.

    Args:
        connection: The connection, in a transaction.
        user_id: Owner of the sessions.
        match: Which of the sessions; all if there are no conditions.
    """
    deleted = (
        sa.delete(chat_sessions)
        .where(_session.user_id == user_id, *match)
        .returning(_session.user_id, _session.id)
        .cte("deleted")
    )
    # A derived id is a UUID of version 5. uuid_extract_version needs PostgreSQL 17.
    is_derived = sa.func.substr(sa.cast(deleted.c.id, sa.Text), 15, 1) == "5"
    source = sa.select(deleted.c.user_id, deleted.c.id, sa.func.clock_timestamp())
    insertion = insert(session_tombstones).from_select(
        ["user_id", "session_id", "deleted_at"],
        # In the order of the key, so that two deletions cannot deadlock.
        source.where(is_derived).order_by(deleted.c.user_id, deleted.c.id),
    )
    inserted = (
        insertion.on_conflict_do_update(
            index_elements=["user_id", "session_id"],
            set_={"deleted_at": insertion.excluded.deleted_at},
        )
        .returning(_tombstone.session_id)
        .cte("inserted")
    )
    count = sa.select(sa.func.count()).select_from(deleted).add_cte(inserted)
    return await connection.scalar(count) or 0


async def purge_slice(connection: AsyncConnection) -> int:
    """Delete up to ROWS_PER_PURGE expired tombstones of all users, and return their number."""
    expires_before = sa.func.clock_timestamp() - sa.text(f"interval '{RETENTION}'")
    expired = (
        sa.select(_tombstone.user_id, _tombstone.session_id)
        .where(_tombstone.deleted_at < expires_before)
        .order_by(_tombstone.deleted_at)
        .limit(ROWS_PER_PURGE)
        .with_for_update(skip_locked=True)
        .subquery("expired")
    )
    statement = sa.delete(session_tombstones).where(
        _tombstone.user_id == expired.c.user_id, _tombstone.session_id == expired.c.session_id
    )
    return (await connection.execute(statement)).rowcount


class TombstonePurger:
    """Purges expired tombstones after writes, in the background."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self.due_at = self._loop.time() + PURGE_INTERVAL_S
        """Time of the event loop's clock from which on a write starts the next purge."""
        self.task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Start a purge if one is due; called after writes that insert tombstones."""
        if self.task is None and self._loop.time() >= self.due_at:
            self.due_at = self._loop.time() + PURGE_INTERVAL_S
            self.task = self._loop.create_task(self._purge())

    async def _purge(self) -> None:
        try:
            count = ROWS_PER_PURGE
            while count == ROWS_PER_PURGE:
                count = await self._database.write(
                    purge_slice,
                    owner_id=NO_OWNER,
                    deadline=self._loop.time() + PURGE_TIMEOUT_S,
                )
        except (ServiceError, *DATABASE_ERRORS) as error:
            # Rows that remain are purged after a later write.
            _log.warning("session tombstones not purged", error=type(error).__name__)
        finally:
            self.task = None
