"""Deletes of many rows in slices, each in a transaction of its own, so that locks are short.

A deletion may end between two slices: its deadline passes, or the process ends. The counts of a
session or a document are therefore corrected in the transaction of each slice. The remainder is a
session without its oldest messages, or a document without its last chunks. The same request, sent
again, deletes the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.schema_names import in_schema, schema_of

MESSAGES_PER_DELETE = 10_000
"""Messages deleted in one transaction, at most.

The cascade of a session of 500,000 messages held its lock for 0.76 s.
"""
CHUNKS_PER_DELETE = 5_000
"""Chunks deleted in one transaction, at most."""
BYTES_PER_DELETE = 64 * 1024 * 1024
"""Bytes of text deleted in one transaction, at most, but for its first row.

PostgreSQL stores a long text in many rows of another table, each of which it has to mark.
"""


class _Kind(NamedTuple):
    """The tables of a kind of slices. The names are inserted into statements."""

    table: str
    parent: str
    """The table of the sessions or documents that own the rows."""
    parent_id: str
    position: str
    """The column that numbers the rows of a parent."""
    size: str
    """The expression of a row's bytes."""
    direction: str
    """Whether the first or the last rows of a parent are deleted first."""
    remaining: str
    """The expression of a parent's count after the deletion of the rows `deleted`."""
    is_counted: str
    """The condition for a row `victim` to be part of that count."""


_MESSAGES = _Kind(
    "chathistory.chat_messages",
    "chathistory.chat_sessions",
    "session_id",
    "seq",
    "size",
    "ASC",
    "message_count = greatest(parent.message_count - counts.count, 0)",
    "victim.deleted_at IS NULL",
)
# From the end, so that the others are still numbered from 0.
_CHUNKS = _Kind(
    "chathistory.document_chunks",
    "chathistory.documents",
    "document_id",
    "chunk_index",
    "octet_length(text) + coalesce(octet_length(vector), 0)",
    "DESC",
    "chunk_count = counts.first_position",
    "TRUE",
)


class Slices:
    """The messages or chunks of a user, or of one session or document, to be deleted in slices."""

    def __init__(self, kind: _Kind, max_rows: int, user_id: str, parent_id: str | None) -> None:
        self._kind = kind
        self._match = "user_id = CAST(:user_id AS uuid)"
        self._values: dict[str, object] = {
            "user_id": user_id,
            "max_rows": max_rows,
            "max_bytes": BYTES_PER_DELETE,
        }
        if parent_id is not None:
            self._match += f" AND {kind.parent_id} = CAST(:parent_id AS uuid)"
            self._values["parent_id"] = parent_id

    async def are_needed(self, connection: AsyncConnection) -> bool:
        """Return whether the rows are too many or too large to be deleted in one transaction."""
        statement = f"""
SELECT count(*) > :max_rows OR coalesce(sum(size), 0) > :max_bytes
FROM (
    SELECT {self._kind.size} AS size FROM {self._kind.table} WHERE {self._match}
    LIMIT CAST(:max_rows AS bigint) + 1
) AS rows
"""  # noqa: S608 - only constants of this module are inserted
        return bool((await self._execute(connection, statement)).scalar_one())

    async def delete_next(self, connection: AsyncConnection) -> int:
        """Delete the next slice and correct the counts; return how much they have decreased."""
        await self._execute(connection, self._lock_statement())
        return int((await self._execute(connection, self._delete_statement())).scalar_one())

    async def _execute(self, connection: AsyncConnection, sql: str) -> sa.CursorResult[Any]:
        statement = sa.text(in_schema(sql, schema_of(connection)))
        return await connection.execute(statement, self._values)

    def _lock_statement(self) -> str:
        # The sessions first and in the order of their ids, as every other writer does: a writer
        # that locks the session before its messages would deadlock with this one.
        return f"""
SELECT id FROM {self._kind.parent}
WHERE user_id = CAST(:user_id AS uuid) AND id IN (SELECT {self._kind.parent_id} FROM {self._slice})
ORDER BY id
FOR UPDATE
"""  # noqa: S608 - only constants of this module are inserted

    @property
    def _slice(self) -> str:
        kind = self._kind
        order = f"{kind.parent_id} {kind.direction}, {kind.position} {kind.direction}"
        return f"""(
    SELECT {kind.parent_id}, {kind.position}, {kind.size} AS size FROM {kind.table}
    WHERE {self._match} ORDER BY {order} LIMIT :max_rows
) AS first_rows"""  # noqa: S608 - only constants of this module are inserted

    def _delete_statement(self) -> str:
        kind = self._kind
        order = f"{kind.parent_id} {kind.direction}, {kind.position} {kind.direction}"
        return f"""
WITH sized AS (
    SELECT {kind.parent_id}, {kind.position},
           sum(size) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) - size AS bytes_before
    FROM {self._slice}
), deleted AS (
    DELETE FROM {kind.table} AS victim USING sized
    WHERE victim.user_id = CAST(:user_id AS uuid)
      AND victim.{kind.parent_id} = sized.{kind.parent_id}
      AND victim.{kind.position} = sized.{kind.position}
      AND sized.bytes_before < :max_bytes
    RETURNING victim.{kind.parent_id}, victim.{kind.position}, {kind.is_counted} AS is_counted
), counts AS (
    SELECT {kind.parent_id} AS parent_id, min({kind.position}) AS first_position,
           count(*) FILTER (WHERE is_counted) AS count
    FROM deleted GROUP BY {kind.parent_id}
), corrected AS (
    UPDATE {kind.parent} AS parent SET {kind.remaining}
    FROM counts WHERE parent.user_id = CAST(:user_id AS uuid) AND parent.id = counts.parent_id
)
SELECT coalesce(sum(count), 0) FROM counts
"""  # noqa: S608 - only constants of this module are inserted


def message_slices(user_id: str, session_id: str | None = None) -> Slices:
    """Return the messages of a user, or of one session. Tombstones of messages do not count."""
    return Slices(_MESSAGES, MESSAGES_PER_DELETE, user_id, session_id)


def chunk_slices(user_id: str, document_id: str | None = None) -> Slices:
    """Return the chunks of a user, or of one document."""
    return Slices(_CHUNKS, CHUNKS_PER_DELETE, user_id, document_id)
