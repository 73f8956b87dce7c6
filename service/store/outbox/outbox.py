"""What the search index still owes: written in the transaction of each change, worked off by search/indexer.py.

One row an entity (a document, a session for its messages, a user who has gone), not one a change: however often a session grows while
nobody looks, there is one row to take, and a delete cannot be overtaken by an older upsert. A row says which items have changed
(`since`..`through`: chunks by their index, messages by their seq) and whether points may be left that nothing stands behind (`wipe`).

Taking a row moves these into the `taken_…` columns, so that what changes meanwhile is told apart from what is being done; `version`
counts the changes. A row goes when its version is still the one that was taken; a lease that was not finished simply ends, and whoever
takes the row next gets both. Statements on several rows skip those that an append holds, so that neither waits for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import (
    Boolean,
    ColumnElement,
    case,
    exists,
    func,
    literal,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.database import Database
from service.store.db.hot_pool import Statement
from service.store.tables import OutboxKind, search_indexes, search_outbox

MAX_POSITION = 2**63 - 1
"""Beyond every chunk's index and every message's seq."""

MAX_ATTEMPTS = 5
"""Tries of what is refused, before it is given up. A session that was given up and grows is tried with what is new alone."""

_own = search_outbox.c
_KEY = ("kind", "user_id", "entity_id")
_NEVER: ColumnElement[datetime] = literal_column("'infinity'::timestamptz")


async def enqueue(
    connection: AsyncConnection,
    kind: OutboxKind,
    user_id: str,
    entity_id: str,
    *,
    since: int = 0,
    through: int = MAX_POSITION,
    wipe: bool = False,
    search_enabled: bool = True,
) -> None:
    """Note that the index owes some items of an entity.

    With search off (`on` False) nothing is noted, but for what must leave an index that was built before.
    """
    if not (search_enabled or wipe):
        return
    values = {
        "kind": literal(int(kind), _own.kind.type),
        "user_id": literal(user_id, _own.user_id.type),
        "entity_id": literal(entity_id, _own.entity_id.type),
        "since": literal(since, _own.since.type),
        "through": literal(through, _own.through.type),
        "wipe": literal(wipe, Boolean),
    }
    row = select(*values.values())
    if not search_enabled:
        row = row.where(exists(select(search_indexes.c.alias)))
    new = insert(search_outbox).from_select(list(values), row)
    await connection.execute(
        new.on_conflict_do_update(
            index_elements=list(_KEY),
            set_={
                "version": _own.version + 1,
                "since": func.least(_own.since, new.excluded.since),
                "through": func.greatest(_own.through, new.excluded.through),
                "wipe": _own.wipe | new.excluded.wipe,
                # What was given up is tried again when it has changed.
                "due_at": case((_own.due_at == _NEVER, new.excluded.due_at), else_=_own.due_at),
            },
        )
    )


async def enqueue_user(connection: AsyncConnection, user_id: str, *, search_enabled: bool) -> None:
    """Note that all points of a user must go; leases under way on things of theirs do not count as done."""
    bumped = update(search_outbox).where(_own.user_id == user_id)
    await connection.execute(
        bumped.values(version=_own.version + 1, since=0, through=MAX_POSITION, wipe=True)
    )
    await enqueue(
        connection, OutboxKind.USER, user_id, user_id, wipe=True, search_enabled=search_enabled
    )


class LeasedRow(NamedTuple):
    """A row that was taken to be worked off."""

    kind: int
    user_id: str
    entity_id: str
    version: int
    since: int
    through: int
    wipe: bool
    attempts: int
    age_s: float
    """Seconds since the oldest change."""


class Backlog(NamedTuple):
    """How much is owed."""

    pending: int
    failed: int
    oldest_age_s: float
    """Seconds since the oldest change that waits."""
    next_due_s: float | None
    """Seconds until the next row may be taken; None when nothing waits."""


# A user who has gone goes first: points of one who came back with the same id must not go with them.
_CLAIM = Statement.from_text(f"""
WITH due AS (
    SELECT o.kind, o.user_id, o.entity_id
    FROM search_outbox AS o
    WHERE o.due_at <= now()
      AND (o.kind = {OutboxKind.USER:d} OR NOT EXISTS (
        SELECT FROM search_outbox AS u WHERE u.kind = {OutboxKind.USER:d} AND u.user_id = o.user_id AND u.entity_id = o.user_id))
    ORDER BY o.due_at
    LIMIT $1
    FOR UPDATE OF o SKIP LOCKED
)
UPDATE search_outbox AS o SET
    lease_id = $2, due_at = clock_timestamp() + $3 * interval '1 second',
    taken_since = CASE WHEN o.kind = {OutboxKind.SESSION:d} AND o.attempts >= {MAX_ATTEMPTS} THEN o.since ELSE least(o.taken_since, o.since) END,
    taken_through = greatest(o.taken_through, o.through),
    taken_wipe = o.taken_wipe OR o.wipe,
    attempts = CASE WHEN o.kind = {OutboxKind.SESSION:d} AND o.attempts >= {MAX_ATTEMPTS} THEN 0 ELSE o.attempts END,
    since = {MAX_POSITION}, through = -1, wipe = false
FROM due AS d
WHERE o.kind = d.kind AND o.user_id = d.user_id AND o.entity_id = d.entity_id
RETURNING o.kind, o.user_id::text, o.entity_id::text, o.version, o.taken_since, o.taken_through, o.taken_wipe, o.attempts,
          date_part('epoch', clock_timestamp() - o.owed_at)
""")  # noqa: S608 - nothing but numbers of ours goes in

# Those of the rows that are still ours and that nobody else holds at this moment.
_MINE = """
WITH mine AS (
    SELECT o.kind, o.user_id, o.entity_id, d.version, d.since
    FROM unnest($1::smallint[], $2::uuid[], $3::uuid[], $4::bigint[], $5::bigint[]) AS d (kind, user_id, entity_id, version, since)
    JOIN search_outbox AS o ON o.kind = d.kind AND o.user_id = d.user_id AND o.entity_id = d.entity_id
    WHERE o.lease_id = $6
    FOR UPDATE OF o SKIP LOCKED
)"""
_IS_MINE = "o.kind = m.kind AND o.user_id = m.user_id AND o.entity_id = m.entity_id"
_IDS = "o.kind, o.user_id::text, o.entity_id::text"

_FINISH = Statement.from_text(f"""{_MINE}, gone AS (
    DELETE FROM search_outbox AS o USING mine AS m WHERE {_IS_MINE} AND o.version = m.version RETURNING {_IDS}
), kept AS (
    UPDATE search_outbox AS o SET
        taken_since = NULL, taken_through = NULL, taken_wipe = false, lease_id = NULL, attempts = 0, detail = '',
        due_at = clock_timestamp(), owed_at = clock_timestamp()
    FROM mine AS m WHERE {_IS_MINE} AND o.version <> m.version RETURNING {_IDS}
)
SELECT * FROM gone UNION ALL SELECT * FROM kept
""")  # noqa: S608 - nothing but text of ours goes in

_RENEW = Statement.from_text(f"""{_MINE}
UPDATE search_outbox AS o SET due_at = clock_timestamp() + $7 * interval '1 second', taken_since = m.since
FROM mine AS m WHERE {_IS_MINE} RETURNING {_IDS}
""")  # noqa: S608

_RELEASE = Statement.from_text(f"""{_MINE}
UPDATE search_outbox AS o SET
    lease_id = NULL, taken_since = m.since, attempts = o.attempts + $8, detail = $9,
    due_at = CASE WHEN $7::float8 < 0 THEN 'infinity' ELSE clock_timestamp() + $7 * interval '1 second' END
FROM mine AS m WHERE {_IS_MINE} RETURNING {_IDS}
""")  # noqa: S608

BACKLOG = Statement.from_text("""
SELECT count(*) FILTER (WHERE due_at < 'infinity'), count(*) FILTER (WHERE due_at = 'infinity'),
       coalesce(date_part('epoch', clock_timestamp() - min(owed_at) FILTER (WHERE due_at < 'infinity')), 0),
       date_part('epoch', min(due_at) FILTER (WHERE due_at < 'infinity') - clock_timestamp())
FROM search_outbox
""")

_RETRY_FAILED = Statement.from_text(
    "UPDATE search_outbox SET due_at = now(), attempts = 0 WHERE due_at = 'infinity'"
)

OutboxKey = tuple[int, str, str]


def _arguments(
    rows: Sequence[LeasedRow],
) -> tuple[list[int], list[str], list[str], list[int], list[int]]:
    return (
        [row.kind for row in rows],
        [row.user_id for row in rows],
        [row.entity_id for row in rows],
        [row.version for row in rows],
        [row.since for row in rows],
    )


class Outbox:
    """The rows as their worker sees them; each method is one statement, without a retry.

    Raises:
        Whatever the driver raises (`DATABASE_ERRORS`).
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, lease_id: str, seconds: float, limit: int) -> list[LeasedRow]:
        """Take up to `limit` rows that are due, for so long."""
        return [
            LeasedRow(*row)
            for row in await self._database.fetch_once(_CLAIM, limit, lease_id, seconds)
        ]

    async def finish(self, lease_id: str, rows: Sequence[LeasedRow]) -> set[OutboxKey]:
        """Remove rows that have not changed, give the others free; return those that were reached."""
        return {
            (row[0], row[1], row[2])
            for row in await self._database.fetch_once(_FINISH, *_arguments(rows), lease_id)
        }

    async def renew(
        self, lease_id: str, rows: Sequence[LeasedRow], seconds: float
    ) -> set[OutboxKey]:
        """Hold rows for longer, from their `since` on; return those that are still ours."""
        return {
            (row[0], row[1], row[2])
            for row in await self._database.fetch_once(_RENEW, *_arguments(rows), lease_id, seconds)
        }

    async def release(
        self,
        lease_id: str,
        rows: Sequence[LeasedRow],
        pause: float | None,
        *,
        attempts: int = 0,
        detail: str = "",
    ) -> None:
        """Give rows free, to be taken again after a pause; None gives them up."""
        wait = -1.0 if pause is None else pause
        await self._database.fetch_once(
            _RELEASE, *_arguments(rows), lease_id, wait, attempts, detail
        )

    async def backlog(self) -> Backlog:
        """Count what is owed."""
        return Backlog(*(await self._database.fetch_once(BACKLOG))[0])

    async def retry_failed(self) -> None:
        """Let rows that were given up be taken again."""
        await self._database.fetch_once(_RETRY_FAILED)
