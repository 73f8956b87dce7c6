"""Diagnosis for `chat-history check`: properties of the configured database, with advice."""

from __future__ import annotations

import socket
import ssl
import statistics
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.db_errors import NoServer, WrongRole, driver_error, sqlstate
from service.store.db.dsn import Route, Target
from service.store.db.durability import DURABLE, Durability, find_weaknesses, read_durability
from service.store.db.engine import PING_AFTER_IDLE_S, single_use_engine
from service.store.db.schema_names import in_schema
from service.store.db.sqlstates import rule_of
from service.store.outbox.outbox import BACKLOG, Backlog
from service.store.schema.location import UnusableDatabase, encoding_problem, find
from service.store.schema.version import SchemaVersion, schema_version
from service.store.tables import BUILD, REQUIRED_REVISION, SCHEMA

OLDEST_MAJOR, NEWEST_MAJOR = 15, 18
"""Major versions of PostgreSQL that the tests cover."""
ROUND_TRIP_SAMPLES = 5
NEON_SUSPEND_S = 300
"""Idle seconds after which Neon suspends a database by default."""
NEON_WAKE_S = 10
"""Seconds that a suspended Neon database may take to wake."""
SLOW_ROUND_TRIP_S = 0.02
"""Round trip in seconds above which the database is probably in another region."""
INDEX_LAG_NOTE_S = 60.0
"""Age in seconds of the oldest pending index change from which the report mentions it."""
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


class Verdict(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    """Works, but could be improved."""
    TODO = "todo"
    """Does not work until the operator acts."""


class Finding(NamedTuple):
    """One line of a report."""

    subject: str
    message: str
    verdict: Verdict = Verdict.OK


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


class Pool(NamedTuple):
    """Pool settings of one service process; times in seconds."""

    size: int
    """Connections kept open."""
    overflow: int
    """Connections allowed beyond `size`."""
    recycle_s: float
    """Age at which a connection is replaced."""
    connect_timeout_s: float


def diagnose(
    description: Description, target: Target, pool: Pool, *, raises_synchronous_commit: bool = True
) -> list[Finding]:
    """Return the findings on a database and on its use by a service with this pool."""
    return [
        Finding("database", f"{target.location} as {description.account}"),
        _check_version(description),
        _check_route(description, target),
        _check_tls(description, target),
        Finding("statements", _describe_statements(target)),
        _check_round_trip(description),
        _check_schema(description.schema, description.schema_name),
        _check_pool_size(description, target, pool.size + pool.overflow),
        _check_connections(target, pool),
        *_check_timeouts(description),
        *_check_settings(description, target, raises_synchronous_commit=raises_synchronous_commit),
        *_check_search(description.index_state),
    ]


def _check_version(description: Description) -> Finding:
    if description.major < OLDEST_MAJOR:
        return Finding(
            "PostgreSQL",
            f"{description.version} is not supported: upgrade to {OLDEST_MAJOR} to {NEWEST_MAJOR}",
            Verdict.TODO,
        )
    if description.major > NEWEST_MAJOR:
        return Finding(
            "PostgreSQL",
            f"{description.version} is newer than {NEWEST_MAJOR}, the newest tested version",
            Verdict.NOTE,
        )
    return Finding("PostgreSQL", description.version)


def _check_route(description: Description, target: Target) -> Finding:
    if description.read_only:
        return Finding(
            "connection",
            "read-only: a replica, or default_transaction_read_only is on; "
            "connect to a writable primary",
            Verdict.TODO,
        )
    if target.route in (None, Route.DIRECT):
        return Finding("connection", "direct")
    direct = target.direct()
    migrations = f"; migrations connect to {direct.location}" if direct is not target else ""
    return Finding("connection", f"{target.route.value} ({target.evidence}){migrations}")


def _check_tls(description: Description, target: Target) -> Finding:
    is_local = _is_local(target)
    context = target.connect_args.get("ssl")
    is_verified = isinstance(context, ssl.SSLContext) and context.verify_mode is ssl.CERT_REQUIRED
    mode = f"sslmode={target.ssl_mode}"
    if description.tls and (is_verified or is_local):
        suffix = ", certificate verified" if is_verified else ""
        return Finding("TLS", f"{description.tls}, {mode}{suffix}")
    if description.tls:
        return Finding(
            "TLS",
            f"{description.tls}, {mode}: the certificate is not verified; set sslmode=verify-full",
            Verdict.NOTE,
        )
    if is_local:
        return Finding("TLS", f"none; not needed on this machine ({mode})")
    return Finding(
        "TLS",
        f"none ({mode}): traffic can be read in transit; set sslmode=verify-full",
        Verdict.NOTE,
    )


def _is_local(target: Target) -> bool:
    return all(
        host.startswith(("/", "127.")) or host in ("localhost", "::1")
        for host, _ in target.addresses
    )


def _describe_statements(target: Target) -> str:
    if target.prepared_statements:
        return "prepared"
    return (
        "not prepared, because a transaction pooler may not support prepared statements "
        "(set CHAT_HISTORY_DB_PREPARED_STATEMENTS=on if this one does)"
    )


def _check_round_trip(description: Description) -> Finding:
    message = f"{description.round_trip_s * 1000:.1f} ms, the median of {ROUND_TRIP_SAMPLES}"
    if description.round_trip_s > SLOW_ROUND_TRIP_S:
        return Finding(
            "round trip", f"{message}: run the service in the database's region", Verdict.NOTE
        )
    return Finding("round trip", message)


def _check_schema(schema: SchemaVersion, name: str) -> Finding:
    if schema.problem is not None:
        return Finding("schema", schema.problem, Verdict.TODO)
    message = (
        f"revision {schema.revision:04d} in {name}; this build requires {REQUIRED_REVISION:04d}"
    )
    if schema.revision < BUILD:
        return Finding(
            "schema",
            f"{message} and provides {BUILD:04d}: run `chat-history migrate` when convenient",
            Verdict.NOTE,
        )
    if schema.revision > BUILD:
        message += " or newer"
    if name == "public":
        message += f"; `chat-history move-schema {SCHEMA}` moves it into a schema of its own"
        return Finding("schema", message, Verdict.NOTE)
    return Finding("schema", message)


def _check_pool_size(description: Description, target: Target, max_connections: int) -> Finding:
    message = f"up to {max_connections} connections for each process"
    if target.is_pooled:
        return Finding("pool", f"{message}, to the pooler")
    if max_connections >= description.max_connections:
        return Finding(
            "pool",
            f"{message}, but the database allows {description.max_connections} in total: "
            "lower CHAT_HISTORY_DB_POOL_SIZE",
            Verdict.TODO,
        )
    return Finding("pool", f"{message}; the database allows {description.max_connections} in total")


def _check_connections(target: Target, pool: Pool) -> Finding:
    timeout_s = target.connect_args.get("timeout", pool.connect_timeout_s)
    message = (
        f"{pool.size} kept open, most recently used first; checked before use after "
        f"{PING_AFTER_IDLE_S:g} s idle, replaced after {pool.recycle_s:g} s; "
        f"connect timeout {timeout_s:g} s"
    )
    if not target.is_neon:
        return Finding("connections", message)
    if pool.recycle_s >= NEON_SUSPEND_S:
        message += (
            f": Neon suspends after {NEON_SUSPEND_S} s by default, "
            "so set CHAT_HISTORY_DB_POOL_RECYCLE below that"
        )
        return Finding("connections", message, Verdict.NOTE)
    if timeout_s < NEON_WAKE_S:
        message += f": a suspended Neon database may take longer to wake, so allow {NEON_WAKE_S} s"
        return Finding("connections", message, Verdict.NOTE)
    return Finding("connections", f"{message}: suitable for Neon's suspend and wake times")


def _check_settings(
    description: Description, target: Target, *, raises_synchronous_commit: bool
) -> list[Finding]:
    findings = [
        Finding(
            weakness.setting,
            f"{weakness.value}: {weakness.advice}",
            Verdict.TODO if weakness.is_severe else Verdict.NOTE,
        )
        for weakness in find_weaknesses(
            description.durability,
            raises_synchronous_commit=raises_synchronous_commit,
            is_neon=target.is_neon,
        )
    ]
    problem = encoding_problem(description.encoding, target.url.database or "")
    if problem is not None:
        findings.append(Finding("encoding", problem, Verdict.TODO))
    return findings


def _check_timeouts(description: Description) -> list[Finding]:
    return [
        Finding(
            name,
            f"{timeout_ms} ms: the server ends statements that take longer, and their callers "
            f"receive UNAVAILABLE; run ALTER ROLE … SET {name} = 0",
            Verdict.TODO,
        )
        for name, timeout_ms in description.short_timeouts_ms
    ]


def _check_search(state: IndexState | None) -> list[Finding]:
    if state is None:
        return []
    pending, failed, age_s = state.backlog.pending, state.backlog.failed, state.backlog.oldest_age_s
    message = (
        f"{pending} documents and sessions wait to be indexed, the oldest for {age_s:.0f} s"
        if pending
        else "the index is up to date"
    )
    findings = [
        Finding("search", message, Verdict.NOTE if age_s > INDEX_LAG_NOTE_S else Verdict.OK)
    ]
    if state.backlog.dated_ahead:
        ahead = (
            f"{state.backlog.dated_ahead} of them are dated ahead, as after PostgreSQL's clock was "
            "set back: a running service indexes them, so start it if it is stopped"
        )
        findings.append(Finding("search", ahead, Verdict.NOTE))
    if failed:
        failures = (
            f"{failed} could not be indexed, for example {state.dead_letter_example}: "
            "`chat-history reindex` retries them"
        )
        findings.append(Finding("search", failures, Verdict.NOTE))
    return findings


CANNOT_CONNECT_NOW = "57P03"

_DATA_ERROR_CLASSES = ("22", "23")
"""Classes of SQLSTATEs whose messages quote data: data exceptions and violated constraints."""


def explain(error: BaseException, target: Target) -> str:
    """Return why the database could not be used and what to do, without a password or content."""
    cause = driver_error(error)
    code = sqlstate(error)
    host = target.url.host
    if code is not None or isinstance(cause, NoServer | WrongRole):
        return _explain_refusal(code, cause, target)
    if isinstance(cause, socket.gaierror):
        return f"the host name {host} does not resolve: check DATABASE_URL and this machine's DNS"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _explain_certificate(cause.verify_message, target)
    if "rejected SSL upgrade" in str(cause):
        return (
            f"{target.location} offers no TLS, but sslmode={target.ssl_mode} requires it: "
            "enable TLS there, or set sslmode=disable"
        )
    if isinstance(cause, TimeoutError):
        return f"{target.location} does not respond: check host, port and firewall"
    if isinstance(
        cause, ConnectionRefusedError | FileNotFoundError
    ) or "Connect call failed" in str(cause):
        return f"connection refused at {target.location}: is PostgreSQL running there?"
    if isinstance(cause, asyncpg.InterfaceError | OSError):
        problem = "" if isinstance(cause, UnusableDatabase) else " cannot be reached"
        return f"{target.location}{problem}: {cause}"
    return f"{target.location} cannot be used: {type(cause).__name__}"


def _explain_certificate(message: str, target: Target) -> str:
    if "certificate is not valid for" in message:
        return (
            f"the certificate of {target.location} is for another name ({message}): "
            "use the certificate's name in DATABASE_URL"
        )
    return (
        f"the certificate of {target.url.host} is not trusted ({message}): "
        "set its root certificate in the URL with sslrootcert=FILE"
    )


def _explain_refusal(code: str | None, cause: BaseException, target: Target) -> str:
    """Add advice to the server's own message, which may contain names but never the password."""
    if isinstance(cause, NoServer):
        return f"none of the servers in DATABASE_URL can be used: {cause}"
    if isinstance(cause, WrongRole):
        return f"{target.location} is {cause}: connect to the primary"
    assert code is not None  # noqa: S101 - the server has sent the error
    if code[:2] in _DATA_ERROR_CLASSES:
        return f"{target.location} rejected a value or a row (SQLSTATE {code})"
    advice = (
        "the server is starting or stopping: retry in a moment"
        if code == CANNOT_CONNECT_NOW
        else rule_of(code).cause
    )
    suffix = f": {advice}" if advice else ""
    return f"{target.location} rejected the connection: {cause} (SQLSTATE {code}{suffix})"
