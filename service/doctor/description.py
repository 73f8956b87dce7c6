"""Collects the properties of a database that a diagnosis needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.doctor.server_settings import Setting, read_settings
from service.doctor.text_locale import TextLocale, read_text_locale
from service.store.db.db_errors import DATABASE_ERRORS, LOCK_NOT_AVAILABLE, sqlstate
from service.store.db.dsn import Route, Target
from service.store.db.durability import DURABLE, Durability, read_durability
from service.store.db.engine import single_use_engine
from service.store.db.proofs import prove_commit
from service.store.db.schema_names import in_schema
from service.store.db.table_locks import TableLock, find_table_lock
from service.store.outbox.outbox import BACKLOG, Backlog
from service.store.schema.location import UnusableDatabase, find
from service.store.schema.obstacles import LeftBehind, find_left_behind, inspect_site
from service.store.schema.privileges import MissingPrivilege, find_missing_privileges
from service.store.schema.version import SchemaVersion, schema_version
from service.store.tables import SCHEMA

T = TypeVar("T")

ROUND_TRIP_SAMPLES = 5
COMMIT_TIMEOUT_S = 4.0
"""Seconds in which the server must commit a transaction."""
_BLOCKED = {LOCK_NOT_AVAILABLE, "42501"}
"""SQLSTATEs of a table that is locked, or that the role may not read."""

# The role's own timeouts must not end the diagnosis, which names them. It waits for no lock.
_SET_LIMITS = text(
    "SELECT set_config(v.name, v.value, true) FROM (VALUES "
    "('statement_timeout', '10s'), ('lock_timeout', '1s'), "
    "('transaction_timeout', '0'), ('idle_in_transaction_session_timeout', '0')"
    ") AS v (name, value) WHERE current_setting(v.name, true) IS NOT NULL"
)
_SERVER = text(
    "SELECT current_setting('server_version') AS version, "
    "current_setting('server_version_num')::int / 10000 AS major, "
    "current_user::text AS account, "
    "current_setting('max_connections')::int AS max_connections, "
    "current_setting('transaction_read_only') = 'on' AS read_only, "
    "current_setting('server_encoding') AS encoding, "
    "(SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()) AS tls, "
    "pg_is_in_recovery() AS is_standby, "
    "(SELECT r.rolconnlimit FROM pg_roles AS r "
    "WHERE r.rolname = session_user AND r.rolconnlimit >= 0 AND NOT r.rolsuper) AS role_limit, "
    "(SELECT d.datconnlimit FROM pg_database AS d "
    "WHERE d.datname = current_database() AND d.datconnlimit >= 0) AS database_limit"
)
_CLOCK = text("SELECT extract(epoch FROM clock_timestamp())::float8")
_DEAD_LETTER_EXAMPLE = (
    "SELECT min(entity_id::text || ' (' || detail || ')') FROM chathistory.search_outbox "
    "WHERE due_at = 'infinity'"
)


@dataclass(frozen=True)
class IndexState:
    """Pending and failed changes of the search index."""

    backlog: Backlog
    dead_letter_example: str
    """One entity that could not be indexed, with the cause."""


@dataclass(frozen=True)
class SchemaState:
    """The tables, and what is in their way."""

    version: SchemaVersion | None = None
    """None if it cannot be read."""
    name: str = SCHEMA
    """The schema of the tables."""
    problem: str = ""
    """Why the schema cannot be used, or created; empty if it can."""
    other_schemas: tuple[str, ...] = ()
    """Further schemas that hold tables of ours."""
    left_behind: tuple[LeftBehind, ...] = ()
    missing_privileges: tuple[MissingPrivilege, ...] = ()
    table_lock: TableLock | None = None


@dataclass(frozen=True)
class Description:
    """Properties that the database reports."""

    version: str
    major: int
    account: str
    max_connections: int
    read_only: bool
    encoding: str
    tls: str | None
    """TLS version of the connection, or None."""
    round_trip_s: float
    """Median round trip in seconds."""
    schema: SchemaState
    index_state: IndexState | None = None
    """None when the schema does not fit this build."""
    durability: Durability = DURABLE
    is_standby: bool = False
    role_limit: int | None = None
    """Connections that the role may have; None without a limit."""
    database_limit: int | None = None
    """Connections that the database may have; None without a limit."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    text_locale: TextLocale = field(default_factory=TextLocale)
    clock_ahead_s: float = 0.0
    """Seconds by which PostgreSQL's clock is ahead of that of this machine."""
    write_problem: str | None = None
    """Why no transaction can be committed; empty if one was, None if that was not tried."""


async def describe(target: Target, timeout_s: float) -> Description:
    """Connect with the service's options and collect the properties of the database.

    Raises:
        Exception: Any error of connecting. `explain` turns it into advice.
    """
    engine = single_use_engine(target, connect_timeout_s=timeout_s)
    try:
        async with engine.connect() as connection:
            await connection.execute(_SET_LIMITS)
            row = (await connection.execute(_SERVER)).one()._asdict()
            is_direct = target.route in (None, Route.DIRECT)
            row["tls"] = await _tls_version(connection) or (row["tls"] if is_direct else None)
            row |= await _describe_contents(connection, target, row["encoding"])
            if not (row["read_only"] or row["is_standby"]) and row["durability"].may_confirm:
                # The last step, since it ends the transaction, and perhaps the connection.
                row["write_problem"] = await prove_commit(
                    connection, COMMIT_TIMEOUT_S, proves_space=True
                )
            return Description(**row)
    finally:
        await engine.dispose()


async def _describe_contents(
    connection: AsyncConnection, target: Target, encoding: str
) -> dict[str, Any]:
    """Return the fields of `Description` that need statements of their own."""
    contents: dict[str, Any] = {
        "round_trip_s": await _measure_round_trip(connection),
        "clock_ahead_s": await _measure_clock(connection),
        "settings": await read_settings(connection),
        "durability": await read_durability(connection),
        "schema": await _describe_schema(connection, target.schema),
    }
    schema: SchemaState = contents["schema"]
    if encoding == "UTF8":
        contents["text_locale"] = await read_text_locale(connection)
    if schema.version is not None and schema.version.problem is None:
        contents["index_state"] = await _unless_blocked(
            connection, lambda: _index_state(connection, schema.name)
        )
    return contents


async def _describe_schema(connection: AsyncConnection, configured: str | None) -> SchemaState:
    location = await find(connection)
    ours = (*location.usable, *location.unusable)
    left_behind = await find_left_behind(connection, ours)
    try:
        name = location.choose(configured)
    except UnusableDatabase as error:
        connection = await connection.execution_options(schema_translate_map={None: SCHEMA})
        return SchemaState(problem=str(error), left_behind=left_behind)
    connection = await connection.execution_options(schema_translate_map={None: name})
    version = await _unless_blocked(connection, lambda: schema_version(connection, name))
    problem: str | None = None
    if version is None or not version.revision:
        site = await _unless_blocked(connection, lambda: inspect_site(connection, name))
        problem = site.problem if site is not None else None
    missing = await _unless_blocked(connection, lambda: find_missing_privileges(connection))
    return SchemaState(
        version,
        name,
        problem or "",
        tuple(schema for schema in ours if schema != name),
        left_behind,
        tuple(missing or ()),
        await _unless_blocked(connection, lambda: find_table_lock(connection)),
    )


async def _unless_blocked(
    connection: AsyncConnection, read: Callable[[], Awaitable[T]]
) -> T | None:
    """Return what is read from a table; None if it is locked, or the role may not read it."""
    try:
        async with connection.begin_nested():
            return await read()
    except DATABASE_ERRORS as error:
        if sqlstate(error) not in _BLOCKED:
            raise
        return None


async def _index_state(connection: AsyncConnection, schema: str) -> IndexState:
    backlog = (await connection.execute(text(in_schema(BACKLOG.text, schema)))).one()
    example = await connection.scalar(text(in_schema(_DEAD_LETTER_EXAMPLE, schema)))
    return IndexState(Backlog(*backlog), example or "")


async def _tls_version(connection: AsyncConnection) -> str | None:
    """Return the TLS version of the client's own socket.

    Behind a pooler pg_stat_ssl describes the pooler's connection, and some roles may not read it.
    """
    driver: Any = (await connection.get_raw_connection()).driver_connection
    transport = getattr(driver, "_transport", None)
    channel = transport.get_extra_info("ssl_object") if transport is not None else None
    return channel.version() if channel is not None else None


async def _measure_round_trip(connection: AsyncConnection) -> float:
    samples_s = []
    for _ in range(ROUND_TRIP_SAMPLES):
        start = time.perf_counter()
        await connection.execute(text("SELECT 1"))
        samples_s.append(time.perf_counter() - start)
    return statistics.median(samples_s)


async def _measure_clock(connection: AsyncConnection) -> float:
    before_s = time.time()
    server_s = (await connection.execute(_CLOCK)).scalar_one()
    return float(server_s) - (before_s + time.time()) / 2
