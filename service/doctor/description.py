"""Collects the properties of a database that a diagnosis needs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.dsn import Target
from service.store.db.durability import DURABLE, Durability, read_durability
from service.store.db.engine import single_use_engine
from service.store.db.schema_names import in_schema
from service.store.outbox.outbox import BACKLOG, Backlog
from service.store.schema.location import find
from service.store.schema.version import SchemaVersion, schema_version
from service.store.tables import SCHEMA

ROUND_TRIP_SAMPLES = 5
SHORT_TIMEOUT_MS = 5_000
"""Milliseconds below which a timeout of the server ends statements that the service allows."""

_SERVER = text(
    "SELECT current_setting('server_version') AS version, "
    "current_setting('server_version_num')::int / 10000 AS major, current_user AS account, "
    "current_setting('max_connections')::int AS max_connections, "
    "current_setting('transaction_read_only') = 'on' AS read_only, "
    "current_setting('server_encoding') AS encoding, "
    "(SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()) AS tls"
)

_TIMEOUTS = text(
    "SELECT name, setting FROM pg_settings WHERE name IN "
    "('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout') "
    "ORDER BY name"
)

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
    schema: SchemaVersion
    index_state: IndexState | None = None
    """None when the schema does not fit this build."""
    short_timeouts_ms: tuple[tuple[str, int], ...] = ()
    """The server's timeouts that end the service's statements: their names, and milliseconds."""
    durability: Durability = DURABLE
    schema_name: str = SCHEMA
    """The schema of the tables."""


async def describe(target: Target, timeout_s: float) -> Description:
    """Connect with the service's options and collect the properties of the database.

    Raises:
        Exception: Any error of connecting. `explain` turns it into advice.
    """
    engine = single_use_engine(target, connect_timeout_s=timeout_s)
    try:
        async with engine.connect() as connection:
            row = (await connection.execute(_SERVER)).one()._asdict()
            row["tls"] = await _tls_version(connection) or (
                None if target.is_pooled else row["tls"]
            )
            round_trip_s = await _measure_round_trip(connection)
            schema_name = (await find(connection)).choose(target.schema)
            schema = await schema_version(connection, schema_name)
            index_state = (
                await _index_state(connection, schema_name) if schema.problem is None else None
            )
            durability = await read_durability(connection)
            return Description(
                **row,
                round_trip_s=round_trip_s,
                schema=schema,
                index_state=index_state,
                short_timeouts_ms=await _short_timeouts_ms(connection),
                durability=durability,
                schema_name=schema_name,
            )
    finally:
        await engine.dispose()


async def _short_timeouts_ms(connection: AsyncConnection) -> tuple[tuple[str, int], ...]:
    """Return the names and values of the server's timeouts that end the service's statements."""
    rows = (await connection.execute(_TIMEOUTS)).all()
    timeouts = ((name, int(value)) for name, value in rows)
    return tuple((name, value) for name, value in timeouts if 0 < value < SHORT_TIMEOUT_MS)


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
