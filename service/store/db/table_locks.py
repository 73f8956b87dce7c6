"""Finds the lock on a whole table of ours for which statements wait."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.hot_pool import Statement, fetch_on
from service.store.tables import metadata

_TABLES = sorted(metadata.tables)
# Locks on whole tables that block writes or all statements. Statements also wait behind a lock that
# is itself still waiting for an earlier transaction.
_FIND = Statement.from_text("""
SELECT c.relname AS table_name, l.mode, l.granted AS is_granted, l.pid,
       a.application_name AS application,
       date_part('epoch', clock_timestamp() - a.xact_start) AS age_s
FROM pg_locks AS l
JOIN pg_class AS c ON c.oid = l.relation
LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
  AND c.oid IN (SELECT to_regclass('chathistory.' || t.name) FROM unnest($1::text[]) AS t (name))
  AND l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
ORDER BY l.granted DESC, a.xact_start NULLS LAST LIMIT 1
""")


class TableLock(NamedTuple):
    """A lock on a whole table, for which calls wait."""

    table_name: str
    mode: str
    is_granted: bool
    """False if the holder itself waits for an earlier transaction."""
    pid: int | None
    """The holder's process; None for a prepared transaction."""
    application: str | None
    age_s: float | None
    """Seconds since its transaction began; None if the role may not read that."""

    def __str__(self) -> str:
        holder = "a prepared transaction" if self.pid is None else f"process {self.pid}"
        if self.application:
            holder += f" ({self.application})"
        return f"the table {self.table_name} is locked by {holder}: {self.mode}"


async def find_table_lock(connection: AsyncConnection) -> TableLock | None:
    """Return the oldest lock on a table in use, if there is one.

    Args:
        connection: Its option `schema_translate_map` names the schema of the tables. A transaction
            has begun on it.

    Raises:
        Any error of the driver.
    """
    rows = await fetch_on(connection, _FIND, _TABLES)
    return TableLock(**rows[0]) if rows else None
