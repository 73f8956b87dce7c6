"""What is at the other end of a connection string, and what to do about it: in words, for `chat-history check`."""

from __future__ import annotations

import socket
import ssl
import statistics
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy import NullPool, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from service.store.db.database import PING_AFTER_IDLE
from service.store.db.db_errors import driver_error, sqlstate
from service.store.db.dsn import Target
from service.store.outbox.outbox import BACKLOG, Backlog
from service.store.schema.version import SchemaVersion, schema_version
from service.store.tables import BUILD, REQUIRED_REVISION

OLDEST, NEWEST = 15, 18
"""Major versions of PostgreSQL that the tests run on."""
ROUND_TRIPS = 5
NEON_SUSPENDS, NEON_WAKES = 300, 10
"""Seconds after which Neon suspends a database by default, and which it may need to wake."""
SLOW_ROUND_TRIP = 0.02
"""Seconds beyond which the database seems to be in another region."""
LATE = 60.0
"""Seconds that something may wait for the index before that is worth a note."""

_SERVER = text(
    "SELECT current_setting('server_version') AS version, current_setting('server_version_num')::int / 10000 AS major, "
    "current_user AS account, current_setting('max_connections')::int AS max_connections, "
    "current_setting('transaction_read_only') = 'on' AS read_only, current_setting('synchronous_commit') AS synchronous_commit, "
    "current_setting('server_encoding') AS encoding, (SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()) AS tls"
)

_GIVEN_UP = text(
    "SELECT min(entity_id::text || ' (' || detail || ')') FROM search_outbox WHERE due_at = 'infinity'"
)


class Verdict(StrEnum):
    """What a finding asks of its reader."""

    OK = "ok"
    NOTE = "note"
    """Works, and might be better."""
    TODO = "todo"
    """Does not work before something is done."""


class Finding(NamedTuple):
    """One line of a report."""

    about: str
    words: str
    verdict: Verdict = Verdict.OK


@dataclass(frozen=True)
class Owing:
    """What the search index still owes."""

    backlog: Backlog
    given_up: str
    """One thing that was given up, and why."""


@dataclass(frozen=True)
class Description:
    """What the database says of itself."""

    version: str
    major: int
    account: str
    max_connections: int
    read_only: bool
    synchronous_commit: str
    encoding: str
    tls: str | None
    """The TLS version of the connection, or None."""
    round_trip: float
    """The median, in seconds."""
    schema: SchemaVersion
    owed: Owing | None = None
    """None where the schema does not fit."""


async def describe(target: Target, timeout: float) -> Description:
    """Connect as the service does and look around.

    Raises:
        Whatever connecting raises: see `explain`.
    """
    engine = create_async_engine(
        target.url,
        connect_args={"timeout": timeout} | target.connect_args,
        poolclass=NullPool,
        hide_parameters=True,
    )
    try:
        async with engine.connect() as connection:
            row = (await connection.execute(_SERVER)).one()._asdict()
            row["tls"] = await _tls(connection) or (None if target.pooled else row["tls"])
            round_trip, schema = await _round_trip(connection), await schema_version(connection)
            owed = await _owed(connection) if schema.problem is None else None
            return Description(**row, round_trip=round_trip, schema=schema, owed=owed)
    finally:
        await engine.dispose()


async def _owed(connection: AsyncConnection) -> Owing:
    backlog = (await connection.execute(text(BACKLOG.text))).one()
    given_up = await connection.scalar(_GIVEN_UP)
    return Owing(Backlog(*backlog), given_up or "")


async def _tls(connection: AsyncConnection) -> str | None:
    """Ask the socket itself: behind a pooler pg_stat_ssl speaks of the pooler's connection, and elsewhere it may be hidden."""
    driver: Any = (await connection.get_raw_connection()).driver_connection
    transport = getattr(driver, "_transport", None)
    channel = transport.get_extra_info("ssl_object") if transport is not None else None
    return channel.version() if channel is not None else None


async def _round_trip(connection: AsyncConnection) -> float:
    times = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        await connection.execute(text("SELECT 1"))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Pool(NamedTuple):
    """The pool of one process of the service; times in seconds."""

    size: int
    """Connections kept."""
    overflow: int
    """Connections beyond those."""
    recycle: float
    """After which a connection is replaced."""
    connect_timeout: float


def findings(found: Description, target: Target, pool: Pool) -> list[Finding]:
    """Say what a description means, which `describe` has made of a target, for a service with that pool."""
    return [
        Finding("database", f"{target.place} as {found.account}"),
        _on_version(found),
        _on_route(found, target),
        _on_tls(found, target),
        Finding("statements", _on_statements(target)),
        _on_round_trip(found),
        _on_schema(found.schema),
        _on_pool(found, target, pool.size + pool.overflow),
        _on_connections(target, pool),
        *_on_settings(found),
        *_on_search(found.owed),
    ]


def _on_version(found: Description) -> Finding:
    if found.major < OLDEST:
        return Finding(
            "PostgreSQL",
            f"{found.version} is not supported: upgrade to {OLDEST} to {NEWEST}",
            Verdict.TODO,
        )
    if found.major > NEWEST:
        return Finding(
            "PostgreSQL",
            f"{found.version} is newer than {NEWEST}, the newest that is tested",
            Verdict.NOTE,
        )
    return Finding("PostgreSQL", found.version)


def _on_route(found: Description, target: Target) -> Finding:
    if found.read_only:
        return Finding(
            "connection",
            "read-only: this is a replica, or is set so; connect to the primary",
            Verdict.TODO,
        )
    if not target.pooled:
        return Finding("connection", "direct")
    direct = target.direct()
    how = f"; migrations go to {direct.place}" if direct is not target else ""
    return Finding("connection", f"through a transaction pooler{how}")


def _on_tls(found: Description, target: Target) -> Finding:
    local = _is_local(target)
    context = target.connect_args.get("ssl")
    verified = isinstance(context, ssl.SSLContext) and context.verify_mode is ssl.CERT_REQUIRED
    mode = f"sslmode={target.ssl_mode}"
    if found.tls and (verified or local):
        return Finding("TLS", f"{found.tls}, {mode}{', certificate verified' if verified else ''}")
    if found.tls:
        return Finding(
            "TLS",
            f"{found.tls}, {mode}: nobody looks at the certificate; set sslmode=verify-full",
            Verdict.NOTE,
        )
    if local:
        return Finding("TLS", f"none, and none needed on this machine ({mode})")
    return Finding(
        "TLS",
        f"none ({mode}): whoever is on the way can read along; set sslmode=verify-full",
        Verdict.NOTE,
    )


def _is_local(target: Target) -> bool:
    host = target.url.host or str(target.url.query.get("host", "/"))
    return host.startswith(("/", "127.")) or host in ("localhost", "::1")


def _on_statements(target: Target) -> str:
    if target.prepared_statements:
        return "prepared"
    return "not prepared, as a transaction pooler may not carry them (CHAT_HISTORY_DB_PREPARED_STATEMENTS=on if yours does)"


def _on_round_trip(found: Description) -> Finding:
    words = f"{found.round_trip * 1000:.1f} ms, the median of {ROUND_TRIPS}"
    if found.round_trip > SLOW_ROUND_TRIP:
        return Finding(
            "round trip", f"{words}: run the service in the database's region", Verdict.NOTE
        )
    return Finding("round trip", words)


def _on_schema(schema: SchemaVersion) -> Finding:
    if schema.problem is not None:
        return Finding("schema", schema.problem, Verdict.TODO)
    words = f"revision {schema.revision:04d}, and this build needs {REQUIRED_REVISION:04d}"
    if schema.revision < BUILD:
        return Finding(
            "schema",
            f"{words} and brings {BUILD:04d}: run `chat-history migrate` when convenient",
            Verdict.NOTE,
        )
    return Finding("schema", f"{words} or newer" if schema.revision > BUILD else words)


def _on_pool(found: Description, target: Target, pool: int) -> Finding:
    words = f"up to {pool} connections a process"
    if target.pooled:
        return Finding("pool", f"{words}, to the pooler")
    if pool >= found.max_connections:
        return Finding(
            "pool",
            f"{words}, but the database takes {found.max_connections} in all: lower CHAT_HISTORY_DB_POOL_SIZE",
            Verdict.TODO,
        )
    return Finding("pool", f"{words}; the database takes {found.max_connections} in all")


def _on_connections(target: Target, pool: Pool) -> Finding:
    timeout = target.connect_args.get("timeout", pool.connect_timeout)
    words = (
        f"{pool.size} kept, the last used first; tried before use after {PING_AFTER_IDLE:g} s idle, replaced after {pool.recycle:g} s; "
        f"{timeout:g} s to connect"
    )
    if not target.is_neon:
        return Finding("connections", words)
    if pool.recycle >= NEON_SUSPENDS:
        words += f": Neon suspends after {NEON_SUSPENDS} s by default, so set CHAT_HISTORY_DB_POOL_RECYCLE below that"
        return Finding("connections", words, Verdict.NOTE)
    if timeout < NEON_WAKES:
        words += f": a suspended Neon database may take longer to wake, so allow {NEON_WAKES} s"
        return Finding("connections", words, Verdict.NOTE)
    return Finding("connections", f"{words}: fits Neon's suspending and waking")


def _on_settings(found: Description) -> list[Finding]:
    lines = []
    if found.synchronous_commit == "off":
        words = "off: a crash may lose what was acknowledged; ALTER DATABASE … SET synchronous_commit = on"
        lines.append(Finding("synchronous_commit", words, Verdict.TODO))
    if found.encoding != "UTF8":
        words = f"{found.encoding} cannot hold every text: create the database with ENCODING 'UTF8'"
        lines.append(Finding("encoding", words, Verdict.TODO))
    return lines


def _on_search(owed: Owing | None) -> list[Finding]:
    if owed is None:
        return []
    waiting, failed, age = owed.backlog.pending, owed.backlog.failed, owed.backlog.oldest_age_s
    words = (
        f"{waiting} documents and sessions wait to be indexed, the oldest for {age:.0f} s"
        if waiting
        else "all is indexed"
    )
    lines = [Finding("search", words, Verdict.NOTE if age > LATE else Verdict.OK)]
    if failed:
        more = f"{failed} given up, such as {owed.given_up}: `chat-history reindex` tries it again"
        lines.append(Finding("search", more, Verdict.NOTE))
    return lines


def explain(error: BaseException, target: Target) -> str:
    """Say why a database could not be used and what to do, without a password."""
    cause = driver_error(error)
    code = sqlstate(error)
    host = target.url.host
    if code is not None:
        return _explain_refusal(code, str(cause), target)
    if isinstance(cause, socket.gaierror):
        return (
            f"no host has the name {host}: check DATABASE_URL, and the name service of this machine"
        )
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _explain_certificate(cause.verify_message, target)
    if "rejected SSL upgrade" in str(cause):
        return f"{target.place} offers no TLS, and sslmode={target.ssl_mode} asks for it: turn TLS on there, or set sslmode=disable"
    if isinstance(cause, TimeoutError):
        return f"no answer from {target.place}: check host, port and firewall"
    if isinstance(
        cause, ConnectionRefusedError | FileNotFoundError
    ) or "Connect call failed" in str(cause):
        return f"nothing listens at {target.place}: is PostgreSQL running there?"
    if isinstance(cause, asyncpg.InterfaceError | OSError):
        return f"{target.place} cannot be reached: {cause}"
    return f"{target.place} cannot be used: {type(cause).__name__}"


def _explain_certificate(words: str, target: Target) -> str:
    if "certificate is not valid for" in words:
        return f"the certificate of {target.place} is for another name ({words}): put the name that it is for into DATABASE_URL"
    return f"the certificate of {target.url.host} is not trusted ({words}): name its root in the URL with sslrootcert=FILE"


def _explain_refusal(code: str, words: str, target: Target) -> str:
    """Put the server's own refusal in words that help; its text holds names, and never the password."""
    advice = {
        "28P01": "check user and password in DATABASE_URL",
        "28000": "check user and password in DATABASE_URL",
        "3D000": "create the database, or name another one in DATABASE_URL",
        "42501": "grant the user what it lacks, or migrate as the owner of the schema",
        "53300": "lower CHAT_HISTORY_DB_POOL_SIZE, or use a pooler",
        "57P03": "it is starting or stopping: try again in a moment",
    }.get(code)
    return f"{target.place} refuses: {words}" + (f" ({advice})" if advice else "")
