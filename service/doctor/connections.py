"""Checks the connections: their route, TLS, round trip, number and timeouts."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from service.doctor.description import ROUND_TRIP_SAMPLES, Description
from service.doctor.findings import Finding, Verdict
from service.doctor.server_settings import READ_ONLY
from service.store.db.dsn import Route, Target
from service.store.db.engine import PING_AFTER_IDLE_S

NEON_SUSPEND_S = 300
"""Idle seconds after which Neon suspends a database by default."""
NEON_WAKE_S = 10
"""Seconds that a suspended Neon database may take to wake."""
SLOW_ROUND_TRIP_S = 0.02
"""Round trip in seconds above which the database is probably in another region."""


class Pool(NamedTuple):
    """Pool settings of one service process; times in seconds."""

    size: int
    """Connections kept open."""
    overflow: int
    """Connections allowed beyond `size`."""
    recycle_s: float
    """Age at which a connection is replaced."""
    connect_timeout_s: float


def check_route(description: Description, target: Target) -> Finding:
    if description.is_standby:
        message = "a standby, whose data may be older: connect to the primary"
        return Finding("connection", message, Verdict.TODO)
    if description.read_only:
        setting = description.settings.get(READ_ONLY)
        message = "read-only: connect to a writable primary"
        if setting is not None and setting.value == "on":
            message = f"read-only, as {READ_ONLY} is on: {setting.remedy(READ_ONLY, 'off')}"
        return Finding("connection", message, Verdict.TODO)
    if target.route in (None, Route.DIRECT):
        return Finding("connection", "direct")
    direct = target.direct()
    migrations = f"; migrations connect to {direct.location}" if direct is not target else ""
    return Finding("connection", f"{target.route.value} ({target.evidence}){migrations}")


def check_tls(description: Description, target: Target) -> Finding:
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


def describe_statements(target: Target) -> str:
    if target.prepared_statements:
        return "prepared"
    return (
        "not prepared, because a transaction pooler may not support prepared statements "
        "(set CHAT_HISTORY_DB_PREPARED_STATEMENTS=on if this one does)"
    )


def check_round_trip(description: Description) -> Finding:
    message = f"{description.round_trip_s * 1000:.1f} ms, the median of {ROUND_TRIP_SAMPLES}"
    if description.round_trip_s > SLOW_ROUND_TRIP_S:
        return Finding(
            "round trip", f"{message}: run the service in the database's region", Verdict.NOTE
        )
    return Finding("round trip", message)


def check_pool_size(description: Description, target: Target, max_connections: int) -> Finding:
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
    for limit, owner, statement in (
        (description.role_limit, f"the role {description.account}", "ALTER ROLE"),
        (description.database_limit, "the database", "ALTER DATABASE"),
    ):
        if limit is not None and max_connections > limit:
            message += (
                f", but {owner} may have {limit}: run {statement} … CONNECTION LIMIT -1, or lower "
                "CHAT_HISTORY_DB_POOL_SIZE"
            )
            return Finding("pool", message, Verdict.TODO)
    return Finding("pool", f"{message}; the database allows {description.max_connections} in total")


def check_connections(target: Target, pool: Pool) -> Finding:
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
