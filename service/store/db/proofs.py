"""Probes a database: finds out what it can do while there is evidence against it.

An idle database is left alone. A probe connects, reads the version of the schema, and commits. It
also checks what the SQLSTATEs that calls have met suggest: privileges, locks on tables, disk space.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from math import inf
from typing import NamedTuple

import asyncpg
import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.store.db.db_errors import LOCK_NOT_AVAILABLE, READ_ONLY, describe, sqlstate
from service.store.db.hot_pool import Statement, fetch_in_transaction, fetch_on
from service.store.db.outcomes import Outcomes
from service.store.db.table_locks import TableLock, find_table_lock
from service.store.schema.privileges import find_missing_privileges
from service.store.schema.version import schema_version

LOCK_LOG_INTERVAL_S = 60.0
"""Seconds between two log lines about the same lock."""
MAX_STEPS = 5
"""A probe takes at most this many times the timeout of a step, closing the connection included."""
RELEASE_PAUSE_S = 0.05
"""Seconds in which connections that are not in use return to the pool."""
COMMIT_SHARE = 0.75
"""Share of a step's timeout in which a commit must end."""
_MISSING_PRIVILEGE = "42501"
_TOO_MANY_CONNECTIONS = "53300"
_NO_SPACE = {"53100", "53400"}
_LOCK_SUSPECTS = {LOCK_NOT_AVAILABLE, "57014"}
_STANDBY = f"the server is a standby: connect to the primary (SQLSTATE {READ_ONLY})"
_READ_ONLY_DATABASE = (
    f"the database is read-only: default_transaction_read_only is on (SQLSTATE {READ_ONLY})"
)
_COMMITS_HANG = (
    "commits do not end: a standby of synchronous_standby_names is missing, or the disk of the "
    "write-ahead log does not respond"
)
_COMMIT_ERRORS = (
    DBAPIError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)

_FIND_ROLE = Statement.from_text("""
SELECT pg_is_in_recovery() AS is_standby,
       current_setting('transaction_read_only') = 'on' AS is_read_only,
       has_function_privilege(
           coalesce(to_regprocedure('pg_logical_emit_message(boolean,text,text)'),
                    to_regprocedure('pg_logical_emit_message(boolean,text,text,boolean)')),
           'EXECUTE'
       ) AS can_emit
""")
# The commit of a message in the write-ahead log needs a writable server, space for the log, and the
# synchronous standbys. It changes no table.
_EMIT_MESSAGE = Statement.from_text(
    "SELECT set_config('statement_timeout', $1, true),"
    " pg_logical_emit_message(true, 'chathistory', ''::text)::text"
)
# A sort of 2 MB that exceeds its memory writes a temporary file. That needs space for data without
# making any table grow.
_LIMIT_MEMORY = "SET LOCAL work_mem = '64kB'"
_SORT = """
SELECT count(*) FROM
    (SELECT n FROM generate_series(1, 60000) AS n ORDER BY md5(n::text) OFFSET 0) AS sorted
"""

_log = structlog.get_logger(__name__)


class Problems(NamedTuple):
    """Why the database cannot do a part of the work; empty for a part that it can do."""

    schema: str = ""
    reads: str = ""
    writes: str = ""
    table_lock: TableLock | None = None
    """A lock on a table, which makes some of the calls wait."""

    @property
    def is_failing(self) -> bool:
        """Whether the database cannot do a part of the work."""
        return bool(self.schema or self.reads or self.writes)


class Prober:
    """Probes one database, for readiness and for the health name `database`."""

    def __init__(
        self,
        outcomes: Outcomes,
        *,
        pooled: AsyncEngine,
        unpooled: AsyncEngine,
        max_connections: int,
    ) -> None:
        """Take the engines to probe with.

        Args:
            outcomes: Holds the SQLSTATEs that calls have met.
            pooled: The connections of calls.
            unpooled: Opens a connection for each use.
            max_connections: Size of the pool. If all of its connections are in use, as by calls
                that wait for locks, a probe opens one of its own.
        """
        self._outcomes = outcomes
        self._pooled = pooled
        self._unpooled = unpooled
        self._max_connections = max_connections
        self._has_failed = False
        self.is_read_only = False
        """Whether the last server that was reached, or the only one, does not accept writes."""
        self.table_lock: TableLock | None = None
        """The lock on a whole table that makes calls wait, as long as it is known to exist."""
        self._lock_logged_at = -inf
        self.on_writable: Callable[[], None] = lambda: None
        """Called when writes are accepted again: older connections may be read-only."""
        self.release_connections: Callable[[], None] = lambda: None
        """Called to return connections that are kept for calls, but not in use, to the pool."""

    async def schema_problem(self, timeout_s: float) -> str | None:
        """Read why this build cannot use the schema; None if it can.

        Raises:
            Any error of connecting or of the statement, and TimeoutError.
        """
        async with asyncio.timeout(timeout_s), self._pooled_engine().connect() as connection:
            return (await schema_version(connection)).problem

    async def probe(self, timeout_s: float) -> Problems:
        """Find out what the database can do.

        After a failure it opens a connection of its own, since those of the pool may lead to a
        server that does not answer, or whose role has changed.

        Args:
            timeout_s: Timeout of each step: one is the commit, which may wait for a standby.

        Raises:
            Any error of connecting or of reading, and TimeoutError.
        """
        suspects, self._outcomes.suspects = self._outcomes.suspects, set()
        was_read_only = self.is_read_only
        is_fresh = self._has_failed or bool(suspects & _NO_SPACE)
        self._has_failed = True
        try:
            async with asyncio.timeout(MAX_STEPS * timeout_s):
                problems = await self._probe(suspects, timeout_s, is_fresh=is_fresh)
                if self.is_read_only and not is_fresh:
                    was_read_only = True
                    problems = await self._probe(suspects, timeout_s, is_fresh=True)
        except Exception as error:
            self.is_read_only |= sqlstate(error) == READ_ONLY
            self._outcomes.suspects |= suspects
            raise
        self._has_failed = problems.is_failing
        if problems.is_failing or problems.table_lock:
            self._outcomes.suspects |= suspects  # Until their check finds no problem.
        if was_read_only and not self.is_read_only:
            self.on_writable()
        return problems

    def _pooled_engine(self) -> AsyncEngine:
        checked_out = self._pooled.pool.checkedout()  # type: ignore[attr-defined]
        return self._unpooled if checked_out >= self._max_connections else self._pooled

    async def _probe(self, suspects: set[str], timeout_s: float, *, is_fresh: bool) -> Problems:
        engine = self._unpooled if is_fresh else self._pooled_engine()
        try:
            return await self._probe_on(engine, suspects, timeout_s)
        except Exception as error:
            if sqlstate(error) != _TOO_MANY_CONNECTIONS:
                raise
            # The service's own connections may use up the limit, and work.
            self.release_connections()
            await asyncio.sleep(RELEASE_PAUSE_S)
            if self._pooled_engine() is not self._pooled:
                raise
        return await self._probe_on(self._pooled, suspects, timeout_s)

    async def _probe_on(
        self, engine: AsyncEngine, suspects: set[str], timeout_s: float
    ) -> Problems:
        connection: AsyncConnection | None = None
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(timeout_s):
                    connection = await stack.enter_async_context(engine.connect())
                    schema = (await schema_version(connection)).problem
                    if schema is not None:
                        return Problems(schema=schema)
                    [role] = await fetch_on(connection, _FIND_ROLE)
                    reads, writes = await self._find_missing_privilege(connection, suspects)
                    await self._find_table_lock(connection, suspects)
            except TimeoutError:
                if connection is not None:
                    await _abandon(connection)
                raise
            self.is_read_only = role["is_standby"] or role["is_read_only"]
            if role["is_standby"]:
                # Its data may be older than what was acknowledged.
                reads = writes = _STANDBY
            elif role["is_read_only"]:
                writes = _READ_ONLY_DATABASE
            elif role["can_emit"] and not writes:
                proves_space = bool(suspects & _NO_SPACE)
                writes = await prove_commit(connection, timeout_s, proves_space=proves_space)
        return Problems(reads=reads, writes=writes, table_lock=self.table_lock)

    @staticmethod
    async def _find_missing_privilege(
        connection: AsyncConnection, suspects: set[str]
    ) -> tuple[str, str]:
        """Return the problem of reads and that of writes, if calls lacked a privilege."""
        if _MISSING_PRIVILEGE not in suspects:
            return "", ""
        missing = await find_missing_privileges(connection)
        if not missing:
            return "", ""
        problem = f"{missing[0]}: grant it (SQLSTATE {_MISSING_PRIVILEGE})"
        return (problem if missing[0].privilege == "SELECT" else ""), problem

    async def _find_table_lock(self, connection: AsyncConnection, suspects: set[str]) -> None:
        if not suspects & _LOCK_SUSPECTS:
            return
        previous, self.table_lock = self.table_lock, await find_table_lock(connection)
        if self.table_lock is None:
            return
        now = asyncio.get_running_loop().time()
        is_known = previous is not None and previous.pid == self.table_lock.pid
        if not is_known or now - self._lock_logged_at > LOCK_LOG_INTERVAL_S:
            self._lock_logged_at = now
            _log.warning(
                "tables locked",
                table=self.table_lock.table_name,
                mode=self.table_lock.mode,
                granted=self.table_lock.is_granted,
                pid=self.table_lock.pid,
                application=self.table_lock.application,
                age_s=self.table_lock.age_s,
            )


async def prove_commit(
    connection: AsyncConnection, timeout_s: float, *, proves_space: bool = False
) -> str:
    """Commit a message in the write-ahead log, after a rollback of the connection's transaction.

    Args:
        connection: The connection, which is closed if the server does not answer in time.
        timeout_s: Seconds in which the commit must end, and wait for the synchronous standbys.
        proves_space: Whether to write a temporary file, too.

    Returns:
        Why a transaction cannot be committed, or an empty string.
    """
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None  # noqa: S101 - it is checked out
    loop = asyncio.get_running_loop()
    slow_at = loop.time() + timeout_s * COMMIT_SHARE
    try:
        async with asyncio.timeout(timeout_s):
            await connection.rollback()
            # The server ends a wait for a standby, as if the commit had succeeded. It would not
            # notice that a client has left, and keep a process for each probe.
            commit_timeout = f"{timeout_s * COMMIT_SHARE * 1000:.0f}"
            await fetch_in_transaction(driver, _EMIT_MESSAGE, commit_timeout)
            if loop.time() >= slow_at:
                return _COMMITS_HANG
            if proves_space:
                await _prove_space(connection)
    except TimeoutError:
        await _abandon(connection)
        return _COMMITS_HANG
    except _COMMIT_ERRORS as error:
        return _COMMITS_HANG if loop.time() >= slow_at else describe(error)
    finally:
        if driver.is_closed():
            await _abandon(connection)
    return ""


async def _prove_space(connection: AsyncConnection) -> None:
    """Write a temporary file, which needs space for data."""
    await connection.exec_driver_sql(_LIMIT_MEMORY)
    await connection.exec_driver_sql(_SORT)
    await connection.rollback()


async def _abandon(connection: AsyncConnection) -> None:
    """Close a connection without waiting for the server, which may not answer at all."""
    if connection.invalidated:
        return
    driver = (await connection.get_raw_connection()).driver_connection
    if driver is not None:
        driver.terminate()
    await connection.invalidate()
