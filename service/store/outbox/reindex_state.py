"""The state of a rebuild of a search index: the collection that is built, and its progress.

A rebuild enqueues all documents and all sessions in slices. Until it ends, all indexers write to
both the live and the new collection, so changes during the rebuild reach the new collection, too.
When all enqueued rows are processed, the new collection replaces the live one.
"""

from __future__ import annotations

from typing import NamedTuple

from service.store.db.database import Database
from service.store.db.hot_pool import Statement
from service.store.outbox.outbox import CLOCK_STEP_S, MAX_POSITION
from service.store.tables import OutboxKind

_BUILDING = Statement.from_text("SELECT building FROM chathistory.search_indexes WHERE alias = $1")

# One process at a time runs a rebuild; another one continues it after the lease has expired. A
# lease that ends too late was taken before PostgreSQL's clock was set back.
_ACQUIRE = Statement.from_text(f"""
INSERT INTO chathistory.search_indexes AS i (alias, lease_id, lease_until)
VALUES ($1, $2, clock_timestamp() + $3 * interval '1 second')
ON CONFLICT (alias) DO UPDATE SET
    lease_id = excluded.lease_id, lease_until = excluded.lease_until
WHERE i.lease_until IS NULL OR i.lease_until < clock_timestamp() OR i.lease_id = excluded.lease_id
      OR i.lease_until > clock_timestamp() + {CLOCK_STEP_S} * interval '1 second'
RETURNING building, after_kind, after_user_id::text, after_entity_id::text, handed_out, total
""")  # noqa: S608 - only a constant is inserted

_BEGIN = Statement.from_text("""
UPDATE chathistory.search_indexes SET
    building = $3,
    after_kind = 0, after_user_id = DEFAULT, after_entity_id = DEFAULT, handed_out = 0,
    total = (SELECT count(*) FROM chathistory.documents)
        + CASE WHEN $4 THEN (SELECT count(*) FROM chathistory.chat_sessions) ELSE 0 END
WHERE alias = $1 AND lease_id = $2
""")

# Only a rebuild and a delete enqueue a range up to MAX_POSITION, and a delete sets `wipe` too.
_PROGRESS = Statement.from_text(f"""
SELECT i.building, i.total, i.handed_out,
       (SELECT count(*) FROM chathistory.search_outbox AS o
        WHERE ((o.through = {MAX_POSITION} AND NOT o.wipe)
               OR (o.taken_through = {MAX_POSITION} AND NOT o.taken_wipe))
          AND o.due_at < 'infinity' AND i.building IS NOT NULL),
       (SELECT count(*) FROM chathistory.search_outbox AS o WHERE o.due_at = 'infinity')
FROM chathistory.search_indexes AS i WHERE i.alias = $1
""")  # noqa: S608 - only a constant is inserted

# The cursor is reset, because its ids must not remain here when that user is deleted.
_END = Statement.from_text("""
UPDATE chathistory.search_indexes SET
    building = NULL, lease_id = NULL, lease_until = NULL,
    after_kind = 0, after_user_id = DEFAULT, after_entity_id = DEFAULT
WHERE alias = $1 AND lease_id = $2
""")

_RELEASE = Statement.from_text("""
UPDATE chathistory.search_indexes SET lease_id = NULL, lease_until = NULL
WHERE alias = $1 AND lease_id = $2
""")


def _enqueue_slice(kind: OutboxKind, table: str) -> Statement:
    return Statement.from_text(f"""
WITH slice AS (
    SELECT t.user_id, t.id FROM {table} AS t
    WHERE (t.user_id, t.id) > ($3, $4) ORDER BY t.user_id, t.id LIMIT $5
), enqueued AS (
    INSERT INTO chathistory.search_outbox AS o (kind, user_id, entity_id, since, through)
    SELECT {kind:d}, s.user_id, s.id, 0, {MAX_POSITION} FROM slice AS s ORDER BY s.user_id, s.id
    ON CONFLICT (kind, user_id, entity_id) DO UPDATE SET
        version = o.version + 1, since = 0, through = {MAX_POSITION},
        due_at = CASE WHEN o.due_at = 'infinity' THEN excluded.due_at ELSE o.due_at END
), last AS (
    SELECT s.user_id, s.id, (SELECT count(*) FROM slice) AS count
    FROM slice AS s ORDER BY s.user_id DESC, s.id DESC LIMIT 1
)
UPDATE chathistory.search_indexes AS i SET
    after_kind = {kind:d}, after_user_id = l.user_id, after_entity_id = l.id,
    handed_out = i.handed_out + l.count,
    lease_until = clock_timestamp() + $6 * interval '1 second'
FROM last AS l WHERE i.alias = $1 AND i.lease_id = $2
RETURNING l.user_id::text, l.id::text
""")  # noqa: S608 - only constants are inserted


_ENQUEUE_SLICE = {
    OutboxKind.DOCUMENT: _enqueue_slice(OutboxKind.DOCUMENT, "chathistory.documents"),
    OutboxKind.SESSION: _enqueue_slice(OutboxKind.SESSION, "chathistory.chat_sessions"),
}


class RebuildCursor(NamedTuple):
    """Position of a rebuild: the entity that was enqueued last."""

    collection: str | None
    """The collection that is built; None when no rebuild is in progress."""
    kind: int
    user_id: str
    entity_id: str
    enqueued: int
    total: int


class RebuildProgress(NamedTuple):
    """Progress of a rebuild, in numbers of entities."""

    collection: str | None
    """The collection that is built; None when no rebuild is in progress."""
    total: int
    enqueued: int
    pending: int
    """Enqueued by the rebuild and not indexed yet."""
    failed: int
    """Dead letters in the outbox."""

    @property
    def done(self) -> int:
        """Number of indexed entities."""
        return max(0, min(self.total, self.enqueued) - self.pending)


class ReindexState:
    """The state of one index; each method is one statement, without a retry.

    Raises:
        The driver's errors (`DATABASE_ERRORS`).
    """

    def __init__(self, database: Database, alias: str) -> None:
        self._database = database
        self._alias = alias

    async def building_collection(self) -> str | None:
        """Return the collection that is built; None when no rebuild is in progress."""
        records = await self._database.fetch_once(_BUILDING, self._alias, is_reading=True)
        return records[0][0] if records else None

    async def acquire(self, lease_id: str, lease_s: float) -> RebuildCursor | None:
        """Acquire or renew the lease for `lease_s` seconds; None if another process holds it."""
        records = await self._database.fetch_once(_ACQUIRE, self._alias, lease_id, lease_s)
        return RebuildCursor(*records[0]) if records else None

    async def begin(self, lease_id: str, collection: str, *, indexes_messages: bool) -> None:
        """Begin to build a collection: from now on, all indexers write to it too.

        Args:
            lease_id: The lease.
            collection: The collection.
            indexes_messages: Whether messages are indexed, so that sessions are counted, too.
        """
        await self._database.fetch_once(_BEGIN, self._alias, lease_id, collection, indexes_messages)

    async def enqueue_slice(
        self,
        lease_id: str,
        kind: OutboxKind,
        cursor: tuple[str, str],
        limit: int,
        lease_s: float,
    ) -> tuple[str, str] | None:
        """Enqueue up to `limit` documents or sessions, and renew the lease.

        Args:
            lease_id: The lease.
            kind: Documents or sessions.
            cursor: User id and id of the last entity of the slice before.
            limit: Maximum number of entities.
            lease_s: Seconds of the lease from now.

        Returns:
            The cursor of the next slice; None at the end, or if the lease is lost.
        """
        records = await self._database.fetch_once(
            _ENQUEUE_SLICE[kind], self._alias, lease_id, *cursor, limit, lease_s
        )
        return (records[0][0], records[0][1]) if records else None

    async def progress(self) -> RebuildProgress | None:
        """Return the progress; None when this index was never built."""
        records = await self._database.fetch_once(_PROGRESS, self._alias, is_reading=True)
        return RebuildProgress(*records[0]) if records else None

    async def end(self, lease_id: str) -> None:
        """Record that the new collection has replaced the old one."""
        await self._database.fetch_once(_END, self._alias, lease_id)

    async def release(self, lease_id: str) -> None:
        """End the lease, so that another process can continue."""
        await self._database.fetch_once(_RELEASE, self._alias, lease_id)
