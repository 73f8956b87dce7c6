"""The search outbox: changes that the search index does not have yet.

Every write enqueues its change in its own transaction, and `search/indexer.py` processes the rows.

There is one row for each entity (a document, a session for its messages, a deleted user), and not
one for each change. However often a session grows while no indexer runs, one row is processed, and
a delete cannot be overtaken by an older upsert. A row states which items have changed (`since` to
`through`: chunks by their index, messages by their seq), and whether orphaned points may remain in
the index (`wipe`).

An indexer claims a row for the time of a lease. The claim moves the changed range into the
`taken_...` columns, so that changes during the lease are recorded separately. `version` counts the
changes: a finished row is deleted only if its version is still the claimed one. After a lease that
has expired unfinished, the next claim gets both ranges. Statements on several rows skip the rows
that an append has locked, so that neither waits for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import NamedTuple

from sqlalchemy import (
    ColumnElement,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.database import Database
from service.store.db.hot_pool import Record, Statement
from service.store.tables import OutboxKind, search_indexes, search_outbox

MAX_POSITION = 2**63 - 1
"""Greater than the index of any chunk and the seq of any message: the end of a whole entity."""

MAX_DELAY_S = 60.0
"""Longest lease of a row, and longest pause before a rejected row is processed again."""
CLOCK_STEP_S = 90.0
"""A row that is due later than this from now is dated ahead: PostgreSQL's clock was set back.

Without a correction it would wait for as long as the clock was set back.
"""
MAX_ATTEMPTS = 5
"""Attempts to index an entity that the index rejects, before its row becomes a dead letter.

A dead letter stays in the table with `due_at` infinity. When a session with a dead letter grows,
only its new messages are tried.
"""

_outbox = search_outbox.c
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
    """Enqueue a change of some items of an entity.

    Args:
        connection: The connection, in the transaction of the change.
        kind: The kind of the entity.
        user_id: Owner of the entity.
        entity_id: The entity.
        since: The first item that has changed: a chunk's index or a message's seq.
        through: The last item that has changed.
        wipe: Whether all points of the entity must be deleted from the index first.
        search_enabled: Whether search is on. If it is off, only deletes are enqueued, and only if
            an index was built earlier.
    """
    if not (search_enabled or wipe):
        return
    await connection.execute(
        _enqueue_statement(search_enabled=search_enabled),
        {
            "new_kind": int(kind),
            "new_user_id": user_id,
            "new_entity_id": entity_id,
            "new_since": since,
            "new_through": through,
            "new_wipe": wipe,
        },
    )


@cache
def _enqueue_statement(*, search_enabled: bool) -> Insert:
    """Return the statement of `enqueue`. To build it takes a millisecond."""
    columns = (
        _outbox.kind,
        _outbox.user_id,
        _outbox.entity_id,
        _outbox.since,
        _outbox.through,
        _outbox.wipe,
    )
    source = select(*(bindparam(f"new_{column.name}", type_=column.type) for column in columns))
    if not search_enabled:
        source = source.where(exists(select(search_indexes.c.alias)))
    insertion = insert(search_outbox).from_select([column.name for column in columns], source)
    new = insertion.excluded
    return insertion.on_conflict_do_update(
        index_elements=list(_KEY),
        set_={
            "version": _outbox.version + 1,
            "since": func.least(_outbox.since, new.since),
            "through": func.greatest(_outbox.through, new.through),
            "wipe": _outbox.wipe | new.wipe,
            # A dead letter becomes due again when its entity changes.
            "due_at": case((_outbox.due_at == _NEVER, new.due_at), else_=_outbox.due_at),
        },
    )


async def enqueue_user(connection: AsyncConnection, user_id: str, *, search_enabled: bool) -> None:
    """Enqueue the deletion of all points of a user.

    The rows of the user's documents and sessions change, too, so that an indexer that has leased
    one of them cannot finish it.
    """
    rows = update(search_outbox).where(_outbox.user_id == user_id)
    await connection.execute(
        rows.values(version=_outbox.version + 1, since=0, through=MAX_POSITION, wipe=True)
    )
    await enqueue(
        connection, OutboxKind.USER, user_id, user_id, wipe=True, search_enabled=search_enabled
    )


class LeasedRow(NamedTuple):
    """A claimed row."""

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
    """Counts and times of the rows in the outbox."""

    pending: int
    failed: int
    """Dead letters."""
    oldest_age_s: float
    """Seconds since the oldest pending change."""
    next_due_s: float | None
    """Seconds until the next row can be claimed; None when no row is pending."""
    dated_ahead: int
    """Pending rows that are due later than CLOCK_STEP_S from now; see `Outbox.date_again`."""


# A session's dead letter is due again because the session has grown: only the new messages are
# tried, with new attempts.
_IS_DEAD_LETTER_OF_SESSION = f"o.kind = {OutboxKind.SESSION:d} AND o.attempts >= {MAX_ATTEMPTS}"
# The row of a deleted user is claimed before all other rows of that user. Otherwise it would delete
# the points of a user that was created later with the same id.
_CLAIM = Statement.from_text(f"""
WITH due AS (
    SELECT o.kind, o.user_id, o.entity_id
    FROM chathistory.search_outbox AS o
    WHERE o.due_at <= now()
      AND (o.kind = {OutboxKind.USER:d} OR NOT EXISTS (
        SELECT FROM chathistory.search_outbox AS u
        WHERE u.kind = {OutboxKind.USER:d} AND u.user_id = o.user_id AND u.entity_id = o.user_id))
    ORDER BY o.due_at
    LIMIT $1
    FOR UPDATE OF o SKIP LOCKED
)
UPDATE chathistory.search_outbox AS o SET
    lease_id = $2, due_at = clock_timestamp() + $3 * interval '1 second',
    taken_since = CASE WHEN {_IS_DEAD_LETTER_OF_SESSION}
                       THEN o.since ELSE least(o.taken_since, o.since) END,
    taken_through = greatest(o.taken_through, o.through),
    taken_wipe = o.taken_wipe OR o.wipe,
    attempts = CASE WHEN {_IS_DEAD_LETTER_OF_SESSION} THEN 0 ELSE o.attempts END,
    since = {MAX_POSITION}, through = -1, wipe = false
FROM due AS d
WHERE o.kind = d.kind AND o.user_id = d.user_id AND o.entity_id = d.entity_id
RETURNING o.kind, o.user_id::text, o.entity_id::text, o.version,
          o.taken_since, o.taken_through, o.taken_wipe, o.attempts,
          greatest(0, date_part('epoch', clock_timestamp() - o.owed_at))
""")  # noqa: S608 - only constants are inserted

# The rows that are still held under the lease, without those that another transaction has locked.
_HELD = """
WITH held AS (
    SELECT o.kind, o.user_id, o.entity_id, d.version, d.since
    FROM unnest($1::smallint[], $2::uuid[], $3::uuid[], $4::bigint[], $5::bigint[])
         AS d (kind, user_id, entity_id, version, since)
    JOIN chathistory.search_outbox AS o
      ON o.kind = d.kind AND o.user_id = d.user_id AND o.entity_id = d.entity_id
    WHERE o.lease_id = $6
    FOR UPDATE OF o SKIP LOCKED
)"""
_IS_HELD = "o.kind = h.kind AND o.user_id = h.user_id AND o.entity_id = h.entity_id"
_KEY_COLUMNS = "o.kind, o.user_id::text, o.entity_id::text"

_FINISH = Statement.from_text(f"""{_HELD}, deleted AS (
    DELETE FROM chathistory.search_outbox AS o USING held AS h
    WHERE {_IS_HELD} AND o.version = h.version RETURNING {_KEY_COLUMNS}
), released AS (
    UPDATE chathistory.search_outbox AS o SET
        taken_since = NULL, taken_through = NULL, taken_wipe = false,
        lease_id = NULL, attempts = 0, detail = '',
        due_at = clock_timestamp(), owed_at = clock_timestamp()
    FROM held AS h WHERE {_IS_HELD} AND o.version <> h.version RETURNING {_KEY_COLUMNS}
)
SELECT * FROM deleted UNION ALL SELECT * FROM released
""")  # noqa: S608 - only constants are inserted

_RENEW = Statement.from_text(f"""{_HELD}
UPDATE chathistory.search_outbox AS o SET
    due_at = clock_timestamp() + $7 * interval '1 second', taken_since = h.since
FROM held AS h WHERE {_IS_HELD} RETURNING {_KEY_COLUMNS}
""")  # noqa: S608 - only constants are inserted

_RELEASE = Statement.from_text(f"""{_HELD}
UPDATE chathistory.search_outbox AS o SET
    lease_id = NULL, taken_since = h.since, attempts = o.attempts + $8, detail = $9,
    due_at = CASE WHEN $7::float8 < 0 THEN 'infinity'
                  ELSE clock_timestamp() + $7 * interval '1 second' END
FROM held AS h WHERE {_IS_HELD} RETURNING {_KEY_COLUMNS}
""")  # noqa: S608 - only constants are inserted

_IS_DATED_AHEAD = (
    f"(due_at < 'infinity' AND due_at > clock_timestamp() + {CLOCK_STEP_S} * interval '1 second')"
)
BACKLOG = Statement.from_text(f"""
SELECT count(*) FILTER (WHERE due_at < 'infinity'), count(*) FILTER (WHERE due_at = 'infinity'),
       greatest(0, date_part('epoch',
           clock_timestamp() - min(owed_at) FILTER (WHERE due_at < 'infinity'))),
       date_part('epoch',
           min(CASE WHEN {_IS_DATED_AHEAD} THEN clock_timestamp() ELSE due_at END)
               FILTER (WHERE due_at < 'infinity') - clock_timestamp()),
       count(*) FILTER (WHERE {_IS_DATED_AHEAD})
FROM chathistory.search_outbox
""")  # noqa: S608 - only constants are inserted

# A lease is kept for its full length: its indexer may still write, and must be the only one then.
_DATE_AGAIN = Statement.from_text(f"""
WITH ahead AS (
    SELECT o.kind, o.user_id, o.entity_id FROM chathistory.search_outbox AS o
    WHERE {_IS_DATED_AHEAD}
    FOR UPDATE OF o SKIP LOCKED
)
UPDATE chathistory.search_outbox AS o SET
    due_at = clock_timestamp()
        + CASE WHEN o.lease_id IS NULL THEN 0 ELSE {MAX_DELAY_S} END * interval '1 second',
    owed_at = least(o.owed_at, clock_timestamp())
FROM ahead AS a
WHERE o.kind = a.kind AND o.user_id = a.user_id AND o.entity_id = a.entity_id
RETURNING {_KEY_COLUMNS}
""")  # noqa: S608 - only constants are inserted

_RETRY_FAILED = Statement.from_text(
    "UPDATE chathistory.search_outbox SET due_at = now(), attempts = 0 WHERE due_at = 'infinity'"
)

OutboxKey = tuple[int, str, str]
"""A row: kind, user id, entity id."""


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


def _keys(records: Sequence[Record]) -> set[OutboxKey]:
    return {(record[0], record[1], record[2]) for record in records}


class Outbox:
    """The outbox as an indexer uses it; each method is one statement, without a retry.

    Raises:
        The driver's errors (`DATABASE_ERRORS`).
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, lease_id: str, lease_s: float, limit: int) -> list[LeasedRow]:
        """Claim up to `limit` rows that are due, for `lease_s` seconds."""
        records = await self._database.fetch_once(_CLAIM, limit, lease_id, lease_s)
        return [LeasedRow(*record) for record in records]

    async def finish(self, lease_id: str, rows: Sequence[LeasedRow]) -> set[OutboxKey]:
        """Delete rows, or release those that have changed since the claim.

        Returns:
            The keys of the deleted and released rows. The others were locked, or the lease on them
            is lost.
        """
        return _keys(await self._database.fetch_once(_FINISH, *_arguments(rows), lease_id))

    async def renew(
        self, lease_id: str, rows: Sequence[LeasedRow], lease_s: float
    ) -> set[OutboxKey]:
        """Extend the lease on rows by `lease_s` seconds from now, and store their `since`.

        Returns:
            The keys of the rows whose lease was extended.
        """
        return _keys(await self._database.fetch_once(_RENEW, *_arguments(rows), lease_id, lease_s))

    async def release(
        self,
        lease_id: str,
        rows: Sequence[LeasedRow],
        retry_after_s: float | None,
        *,
        attempts: int = 0,
        detail: str = "",
    ) -> set[OutboxKey]:
        """End the lease on rows that are not finished.

        Args:
            lease_id: The lease.
            rows: The rows.
            retry_after_s: Seconds until they can be claimed again; None makes them dead letters.
            attempts: Number of failed attempts to add to their count.
            detail: The reason of the failure.

        Returns:
            The keys of the released rows. The others were locked, or the lease on them is lost.
        """
        wait_s = -1.0 if retry_after_s is None else retry_after_s
        records = await self._database.fetch_once(
            _RELEASE, *_arguments(rows), lease_id, wait_s, attempts, detail
        )
        return _keys(records)

    async def backlog(self) -> Backlog:
        """Count the pending rows and the dead letters."""
        return Backlog(*(await self._database.fetch_once(BACKLOG, is_reading=True))[0])

    async def date_again(self) -> int:
        """Make rows that are dated ahead due now; leased ones at the end of a lease from now.

        Returns:
            Number of these rows. Rows that another transaction has locked stay as they are.
        """
        return len(await self._database.fetch_once(_DATE_AGAIN))

    async def retry_failed(self) -> None:
        """Make all dead letters due now."""
        await self._database.fetch_once(_RETRY_FAILED)
