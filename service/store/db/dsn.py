"""Parses connection strings in the forms of libpq and of Neon's console.

asyncpg takes neither `sslmode` nor `channel_binding`, among others; they are translated here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

from sqlalchemy import URL

from service.store.db import connection_string
from service.store.db.addresses import Address, direct_host, is_neon, is_pooled_neon
from service.store.db.tls_options import note_channel_binding, take_tls_options

PREPARED_STATEMENTS = "statement_cache_size", "prepared_statement_cache_size"
"""The arguments for the caches of prepared statements, of the driver and of SQLAlchemy."""
CONFIGURED = "as configured"
"""The evidence of a route that the configuration names."""

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


class Route(Enum):
    """The way from the service to PostgreSQL; the value is its description in messages."""

    DIRECT = "direct"
    SESSION = "through a proxy that keeps a process of the server for each connection"
    TRANSACTION = "through a transaction pooler"
    """Start-up parameters, state of a session and prepared statements are lost or rejected."""


@dataclass(frozen=True)
class Target:
    """A database, and how to connect to it."""

    url: URL
    """For SQLAlchemy, without options that asyncpg does not know. It names the first server."""
    connect_args: dict[str, Any] = field(repr=False)
    """Arguments of `asyncpg.connect`."""
    route: Route | None
    """The way to the server, if it is configured; else it is found by `route.find_route`."""
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
    preparation: str = "auto"
    """The setting for prepared statements: `on`, `off`, or `auto`, which follows from the route."""
    evidence: str = ""
    """How the route was found."""
    files: tuple[str, ...] = ()
    """The files of certificates and keys."""
    read_again: Callable[[], Target] | None = field(default=None, repr=False, compare=False)
    """Reads the files of the configuration again; None if it is in no file."""

    @property
    def is_pooled(self) -> bool:
        """Whether a transaction pooler is known to be in between."""
        return self.route is Route.TRANSACTION

    @property
    def prepared_statements(self) -> bool:
        """Whether the driver prepares statements and caches them by name."""
        return self.preparation == "on" or (self.preparation == "auto" and not self.is_pooled)

    def current(self) -> Target:
        """Return the target as the files of the configuration have it now."""
        return self if self.read_again is None else self.read_again()

    def with_route(self, route: Route, evidence: str) -> Target:
        """Return the target with its route, for connections of the driver.

        Raises:
            ValueError: the string has options that a transaction pooler does not take.
        """
        settings = dict(self.connect_args["server_settings"])
        target = replace(self, route=route, evidence=evidence)
        _restrict(settings, route)
        arguments = self.connect_args | {"server_settings": settings}
        if not target.prepared_statements:
            arguments |= dict.fromkeys(PREPARED_STATEMENTS, 0)
        return replace(target, connect_args=arguments)

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
            route=None,
            read_again=None,
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
        prepared_statements: `on`, `off` (as through a transaction pooler, which is not looked for
            then), or `auto` (off through a transaction pooler).
        schema: Schema of the tables, as `search_path` in the string; None if it is not configured.
        is_replica: Whether the database is for reads that may lag.

    Raises:
        ValueError: it is not a PostgreSQL connection string, or has an option that cannot be
            honoured; the message does not contain the password.
    """
    url, query, addresses = connection_string.split(text)
    hosts = [address.host for address in addresses]
    has_neon = any(map(is_neon, hosts))
    is_pgbouncer = query.pop("pgbouncer", "") == "true"
    is_pooled = prepared_statements == "off" or is_pgbouncer or any(map(is_pooled_neon, hosts))
    settings = _server_settings(query)
    schema = _schema(query.pop("search_path", settings.pop("search_path", None)), schema)
    session_attrs = _session_attrs(query, is_replica=is_replica)
    mode = query.pop("sslmode", None)
    mode = ssl_mode or mode or ("require" if has_neon else "prefer")
    note = note_channel_binding(mode, query, is_neon=has_neon)
    notes = [note] if note else []
    files = tuple(query[key] for key in ("sslcert", "sslkey", "sslrootcert") if key in query)
    connect_args: dict[str, Any] = {
        "ssl": take_tls_options(mode, hosts, query, is_neon=has_neon),
        "server_settings": settings,
    }
    if timeout_s := _seconds(query.pop("connect_timeout", "0")):
        connect_args["timeout"] = timeout_s
    if passfile := query.pop("passfile", ""):
        connect_args["passfile"] = passfile  # The driver reads it for each connection.
    if unknown := sorted(query.keys() - _WITHOUT_EFFECT):
        raise ValueError(f"{', '.join(unknown)} in the database URL is not supported: remove it")
    notes += [f"{key} in the database URL has no effect" for key in sorted(query)]
    target = Target(
        url.set(drivername="postgresql+asyncpg"),
        connect_args,
        None,
        mode,
        tuple(notes),
        addresses,
        session_attrs,
        schema,
        prepared_statements,
        files=files,
    )
    return target.with_route(Route.TRANSACTION, CONFIGURED) if is_pooled else target


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


def _restrict(settings: dict[str, str], route: Route) -> None:
    """Restrict start-up parameters to those that a pooler takes, if there is one.

    Raises:
        ValueError: a parameter would be lost.
    """
    if route is Route.DIRECT:
        return
    lost = sorted(settings.keys() - {"application_name", "client_encoding"})
    if lost and route is Route.TRANSACTION:
        raise ValueError(
            f"{', '.join(lost)} in the options of the database URL cannot be sent through a "
            "pooler: set it by ALTER ROLE … SET, and remove it from the URL"
        )
    # PostgreSQL's own spelling: PgBouncer takes asyncpg's spelling for a different encoding, and
    # sets that before each transaction.
    settings["client_encoding"] = "UTF8"
