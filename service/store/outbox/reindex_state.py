"""The state of rebuilding a search index: which collection is filled, and how far the outbox was given everything there is.

Rebuilding owes the index every document and every session anew, in slices, and every worker writes to both collections meanwhile; so
whatever changes while it goes on ends up in the new one too. When all of that is worked off, the new one takes the live one's place.
"""

from __future__ import annotations

from typing import NamedTuple

from service.store.db.database import Database
from service.store.db.hot_pool import Statement
from service.store.outbox.outbox import MAX_POSITION
from service.store.tables import OutboxKind

_BUILDING = Statement.from_text("SELECT building FROM search_indexes WHERE alias = $1")

# Only one process does it at a time; what another has left unfinished is taken up when its lease has ended.
_ACQUIRE = Statement.from_text("""
INSERT INTO search_indexes AS i (alias, lease_id, lease_until) VALUES ($1, $2, clock_timestamp() + $3 * interval '1 second')
ON CONFLICT (alias) DO UPDATE SET lease_id = excluded.lease_id, lease_until = excluded.lease_until
WHERE i.lease_until IS NULL OR i.lease_until < clock_timestamp() OR i.lease_id = excluded.lease_id
RETURNING building, after_kind, after_user_id::text, after_entity_id::text, handed_out, total
""")

_BEGIN = Statement.from_text("""
UPDATE search_indexes SET
    building = $3, after_kind = 0, after_user_id = DEFAULT, after_entity_id = DEFAULT, handed_out = 0,
    total = (SELECT count(*) FROM documents) + CASE WHEN $4 THEN (SELECT count(*) FROM chat_sessions) ELSE 0 END
WHERE alias = $1 AND lease_id = $2
""")

# What was handed out is owed up to MAX_POSITION; nothing else is, but for what must go.
_PROGRESS = Statement.from_text(f"""
SELECT i.building, i.total, i.handed_out,
       (SELECT count(*) FROM search_outbox AS o
        WHERE ((o.through = {MAX_POSITION} AND NOT o.wipe) OR (o.taken_through = {MAX_POSITION} AND NOT o.taken_wipe))
          AND o.due_at < 'infinity' AND i.building IS NOT NULL),
       (SELECT count(*) FROM search_outbox AS o WHERE o.due_at = 'infinity')
FROM search_indexes AS i WHERE i.alias = $1
""")  # noqa: S608 - nothing but a number of ours goes in

_END = Statement.from_text(
    # The last that was handed out may be erased one day; its ids must not stay here.
    "UPDATE search_indexes SET building = NULL, lease_id = NULL, lease_until = NULL, "
    "after_kind = 0, after_user_id = DEFAULT, after_entity_id = DEFAULT WHERE alias = $1 AND lease_id = $2"
)

_RELEASE = Statement.from_text(
    "UPDATE search_indexes SET lease_id = NULL, lease_until = NULL WHERE alias = $1 AND lease_id = $2"
)


def _enqueue_slice(kind: OutboxKind, table: str) -> Statement:
    return Statement.from_text(f"""
WITH slice AS (
    SELECT t.user_id, t.id FROM {table} AS t WHERE (t.user_id, t.id) > ($3, $4) ORDER BY t.user_id, t.id LIMIT $5
), enqueued AS (
    INSERT INTO search_outbox AS o (kind, user_id, entity_id, since, through)
    SELECT {kind:d}, s.user_id, s.id, 0, {MAX_POSITION} FROM slice AS s ORDER BY s.user_id, s.id
    ON CONFLICT (kind, user_id, entity_id) DO UPDATE SET
        version = o.version + 1, since = 0, through = {MAX_POSITION},
        due_at = CASE WHEN o.due_at = 'infinity' THEN excluded.due_at ELSE o.due_at END
), last AS (
    SELECT s.user_id, s.id, (SELECT count(*) FROM slice) AS count FROM slice AS s ORDER BY s.user_id DESC, s.id DESC LIMIT 1
)
UPDATE search_indexes AS i SET
    after_kind = {kind:d}, after_user_id = l.user_id, after_entity_id = l.id, handed_out = i.handed_out + l.count,
    lease_until = clock_timestamp() + $6 * interval '1 second'
FROM last AS l WHERE i.alias = $1 AND i.lease_id = $2
RETURNING l.user_id::text, l.id::text
""")  # noqa: S608 - nothing but names and numbers of ours goes in


_ENQUEUE_SLICE = {
    OutboxKind.DOCUMENT: _enqueue_slice(OutboxKind.DOCUMENT, "documents"),
    OutboxKind.SESSION: _enqueue_slice(OutboxKind.SESSION, "chat_sessions"),
}


class RebuildCursor(NamedTuple):
    """Where a rebuilding stands."""

    collection: str | None
    kind: int
    user_id: str
    entity_id: str
    enqueued: int
    total: int


class RebuildProgress(NamedTuple):
    """How far a rebuilding is."""

    collection: str | None
    total: int
    enqueued: int
    pending: int
    failed: int

    @property
    def done(self) -> int:
        """How many entities are indexed."""
        return max(0, min(self.total, self.enqueued) - self.pending)


class ReindexState:
    """The row of one index; each method is one statement, without a retry.

    Raises:
        Whatever the driver raises (`DATABASE_ERRORS`).
    """

    def __init__(self, database: Database, alias: str) -> None:
        self._database = database
        self._alias = alias

    async def building_collection(self) -> str | None:
        """Return the collection that is filled now, if any."""
        rows = await self._database.fetch_once(_BUILDING, self._alias)
        return rows[0][0] if rows else None

    async def acquire(self, lease_id: str, seconds: float) -> RebuildCursor | None:
        """Become the one who does it, or stay it; None when another is."""
        rows = await self._database.fetch_once(_ACQUIRE, self._alias, lease_id, seconds)
        return RebuildCursor(*rows[0]) if rows else None

    async def begin(self, lease_id: str, collection: str, *, messages: bool) -> None:
        """Note which collection is filled: from now on everybody writes to it too."""
        await self._database.fetch_once(_BEGIN, self._alias, lease_id, collection, messages)

    async def enqueue_slice(
        self, lease_id: str, kind: OutboxKind, after: tuple[str, str], limit: int, seconds: float
    ) -> tuple[str, str] | None:
        """Owe the index a slice of all documents or sessions; return the last of it, None at the end."""
        rows = await self._database.fetch_once(
            _ENQUEUE_SLICE[kind], self._alias, lease_id, *after, limit, seconds
        )
        return (rows[0][0], rows[0][1]) if rows else None

    async def progress(self) -> RebuildProgress | None:
        """Say how far it is; None when this index was never built."""
        rows = await self._database.fetch_once(_PROGRESS, self._alias)
        return RebuildProgress(*rows[0]) if rows else None

    async def end(self, lease_id: str) -> None:
        """Note that the new collection has taken the place of the old one."""
        await self._database.fetch_once(_END, self._alias, lease_id)

    async def release(self, lease_id: str) -> None:
        """Leave the rest to another."""
        await self._database.fetch_once(_RELEASE, self._alias, lease_id)
