"""Parses connection strings in the forms of libpq and of Neon's console.

asyncpg takes neither `sslmode` nor `channel_binding`, among others; they are translated here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import URL

from service.store.db import connection_string
from service.store.db.addresses import Address, direct_host, is_neon
from service.store.db.tls_options import note_channel_binding, take_tls_options

_PGBOUNCER_PORT = 6432

SessionAttrs = Literal["prefer-read-write", "read-write", "primary", "prefer-standby", "standby"]
_SESSION_ATTRS: dict[str, SessionAttrs] = {
    "any": "prefer-read-write",
    "read-write": "read-write",
    "primary": "primary",
}
_REPLICA_ATTRS: dict[str, SessionAttrs] = {
    "any": "prefer-standby",
    "read-only": "standby",
    "standby": "standby",
    "prefer-standby": "prefer-standby",
}
_WITHOUT_EFFECT = frozenset(
    {
        "client_encoding",
        "fallback_application_name",
        "gssdelegation",
        "gssencmode",
        "gsslib",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "krbsrvname",
        "load_balance_hosts",
        "sslcert",
        "sslcompression",
        "sslkey",
        "sslpassword",
        "sslrootcert",
        "sslsni",
        "tcp_user_timeout",
    }
)
"""libpq's options without which a connection does the same, and is as safe. Those for certificates
have no effect without TLS."""


@dataclass(frozen=True)
class Target:
    """A database, and how to connect to it."""

    url: URL
    """For SQLAlchemy, without options that asyncpg does not know. It names the first server."""
    connect_args: dict[str, Any] = field(repr=False)
    """Arguments of `asyncpg.connect`."""
    is_pooled: bool
    """Behind a transaction pooler: no start-up parameters, session state or prepared statements."""
    ssl_mode: str
    """The libpq mode that applies."""
    notes: tuple[str, ...] = ()
    """Options of the connection string that were changed or ignored, for the log."""
    addresses: tuple[Address, ...] = ()
    """The servers in the order of the string. Empty: the driver's default socket."""
    session_attrs: SessionAttrs = "prefer-read-write"
    """Required role of a server. By default, a read-only primary serves reads while no server is
    writable; `read-write` excludes it, and `primary` accepts it. A standby serves
    only reads that may lag: `prefer-standby` falls back to a primary, and `standby` does not."""
    schema: str | None = None
    """Schema of the tables, if the configuration names it; else it is found by its columns."""

    @property
    def prepared_statements(self) -> bool:
        """Whether the driver prepares statements and caches them by name."""
        return self.connect_args.get("statement_cache_size") != 0

    @property
    def has_connect_timeout(self) -> bool:
        """Whether the string itself limits the time of an attempt to connect."""
        return "timeout" in self.connect_args

    @property
    def location(self) -> str:
        """Hosts and database, for messages."""
        if len(self.addresses) > 1:
            return f"{','.join(map(str, self.addresses))}/{self.url.database or ''}"
        host = self.url.host or str(self.url.query.get("host", ""))
        if not host or host.startswith("/"):
            return f"the socket in {host}" if host else "the local socket"
        port = f":{self.url.port}" if self.url.port else ""
        return f"{host}{port}/{self.url.database or ''}"

    @property
    def is_replica(self) -> bool:
        """Whether it serves reads that may lag, and nothing else."""
        return self.session_attrs in ("prefer-standby", "standby")

    @property
    def is_neon(self) -> bool:
        """Whether it is a Neon database, which is suspended when idle."""
        return any(is_neon(address.host) for address in self.addresses)

    def direct(self) -> Target:
        """Return the target with Neon's direct hosts instead of its pooled ones, for migrations."""
        host = self.url.host or ""
        if not (self.is_neon and "-pooler." in host):
            return self
        return replace(
            self,
            url=self.url.set(host=direct_host(host)),
            addresses=tuple(
                address._replace(host=direct_host(address.host)) for address in self.addresses
            ),
            is_pooled=False,
        )


def parse(
    text: str,
    ssl_mode: str | None = None,
    *,
    prepared_statements: str = "auto",
    schema: str | None = None,
    is_replica: bool = False,
) -> Target:
    """Parse a connection string.

    Args:
        text: A URL such as `postgresql://user:password@host/database?sslmode=require`, or libpq's
            other form, `host=a,b user=u`. Both may name several servers.
        ssl_mode: Overrides the string's `sslmode`.
        prepared_statements: `on`, `off` (behind a transaction pooler), or `auto` (off when the
            string shows that there is a pooler).
        schema: Schema of the tables, as `search_path` in the string; None if it is not configured.
        is_replica: Whether the database is for reads that may lag.

    Raises:
        ValueError: it is not a PostgreSQL connection string, or has an option that cannot be
            honoured; the message does not contain the password.
    """
    url, query, addresses = connection_string.split(text)
    hosts = [address.host for address in addresses]
    has_neon = any(map(is_neon, hosts))
    is_pgbouncer = query.pop("pgbouncer", "") == "true" or _PGBOUNCER_PORT in (
        url.port,
        *(address.port for address in addresses),
    )
    is_pooled = (
        prepared_statements == "off"
        or is_pgbouncer
        or any("-pooler." in host or ".pooler." in host for host in hosts)
    )
    settings = _server_settings(query)
    schema = _schema(query.pop("search_path", settings.pop("search_path", None)), schema)
    _restrict(settings, is_pooled=is_pooled)
    session_attrs = _session_attrs(query, is_replica=is_replica)
    mode = query.pop("sslmode", None)
    mode = ssl_mode or mode or ("require" if has_neon else "prefer")
    note = note_channel_binding(mode, query, is_neon=has_neon)
    notes = [note] if note else []
    connect_args: dict[str, Any] = {
        "ssl": take_tls_options(mode, hosts, query, is_neon=has_neon),
        "server_settings": settings,
    }
    if timeout_s := _seconds(query.pop("connect_timeout", "0")):
        connect_args["timeout"] = timeout_s
    if is_pooled and prepared_statements != "on":
        connect_args |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    if unknown := sorted(query.keys() - _WITHOUT_EFFECT):
        raise ValueError(f"{', '.join(unknown)} in the database URL is not supported: remove it")
    notes += [f"{key} in the database URL has no effect" for key in sorted(query)]
    return Target(
        url.set(drivername="postgresql+asyncpg"),
        connect_args,
        is_pooled,
        mode,
        tuple(notes),
        addresses,
        session_attrs,
        schema,
    )


def _session_attrs(query: dict[str, str], *, is_replica: bool) -> SessionAttrs:
    value = query.pop("target_session_attrs", "any")
    accepted, rejected = _SESSION_ATTRS, _REPLICA_ATTRS
    if is_replica:
        accepted, rejected = rejected, accepted
    if value in accepted:
        return accepted[value]
    if value in rejected:
        raise ValueError(
            f"target_session_attrs={value} in the database URL is not supported: the service needs "
            f"{'a replica' if is_replica else 'the primary'}"
        )
    raise ValueError(
        "target_session_attrs in the database URL is not one of "
        f"{', '.join(dict.fromkeys((*_SESSION_ATTRS, *_REPLICA_ATTRS)))}"
    )


def _seconds(text: str) -> float:
    if not text.isdecimal():
        raise ValueError("connect_timeout in the database URL is not a whole number of seconds")
    return float(text)


def _server_settings(query: dict[str, str]) -> dict[str, str]:
    """Remove the start-up parameters from the query and return them.

    Raises:
        ValueError: an option has no value.
    """
    settings: dict[str, str] = {"application_name": query.pop("application_name", "chat-history")}
    # -c name=value, -cname=value or --name=value, or a bare name for Neon's own.
    for option in re.sub(r"(^|\s)-c\s*", " ", query.pop("options", "")).split():
        name, _, value = option.removeprefix("--").partition("=")
        if name in ("endpoint", "project"):
            continue  # Neon's name of the compute, for clients without SNI; asyncpg sends SNI.
        if not (name and value):
            raise ValueError("options in the database URL are not of the form -c name=value")
        settings[name.replace("-", "_")] = value
    return settings


def _schema(search_path: str | None, configured: str | None) -> str | None:
    """Return the schema of the tables that the string or the configuration names, if any.

    Raises:
        ValueError: they differ, or the path has several schemas.
    """
    names = [name.strip().strip('"') for name in (search_path or "").split(",")]
    if names in ([""], ["$user", "public"]):  # PostgreSQL's default.
        return configured
    if len(names) > 1:
        raise ValueError(
            "search_path in the database URL names several schemas: "
            "name the one that holds the tables"
        )
    if configured not in (None, names[0]):
        raise ValueError(
            "search_path in the database URL and CHAT_HISTORY_DB_SCHEMA name different schemas: "
            "remove one of them"
        )
    return names[0]


def _restrict(settings: dict[str, str], *, is_pooled: bool) -> None:
    """Restrict start-up parameters to those that a pooler takes, if there is one.

    Raises:
        ValueError: a parameter would be lost.
    """
    if not is_pooled:
        return
    if lost := sorted(settings.keys() - {"application_name", "client_encoding"}):
        raise ValueError(
            f"{', '.join(lost)} in the options of the database URL cannot be sent through a "
            "pooler: set it by ALTER ROLE … SET, and remove it from the URL"
        )
    # PostgreSQL's own spelling: PgBouncer takes asyncpg's spelling for a different encoding, and
    # sets that before each transaction.
    settings["client_encoding"] = "UTF8"
