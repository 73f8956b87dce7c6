"""Parses connection strings in the forms of libpq and of Neon's console.

asyncpg takes neither `sslmode` nor `channel_binding`, among others; they are translated here.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# Bare, in quotes, or as the command that consoles offer: psql 'postgresql://…'.
_CONNECTION_STRING = re.compile(r"""(?:psql\s+)?(['"]?)(\S.*?)\1""", re.DOTALL)
_PGBOUNCER_PORT = "6432"


@dataclass(frozen=True)
class Target:
    """A database, and how to connect to it."""

    url: URL
    """For SQLAlchemy, without options that asyncpg does not know."""
    connect_args: dict[str, Any] = field(repr=False)
    """Arguments of `asyncpg.connect`."""
    is_pooled: bool
    """Behind a transaction pooler: no start-up parameters, session state or prepared statements."""
    ssl_mode: str
    """The libpq mode that applies."""
    notes: tuple[str, ...] = ()
    """Options of the connection string that were changed or ignored, for the log."""

    @property
    def prepared_statements(self) -> bool:
        """Whether the driver prepares statements and caches them by name."""
        return self.connect_args.get("statement_cache_size") != 0

    @property
    def location(self) -> str:
        """Host and database, for messages."""
        host = self.url.host or str(self.url.query.get("host", ""))
        if not host or host.startswith("/"):
            return f"the socket in {host}" if host else "the local socket"
        port = f":{self.url.port}" if self.url.port else ""
        return f"{host}{port}/{self.url.database or ''}"

    @property
    def is_neon(self) -> bool:
        """Whether it is a Neon database, which is suspended when idle."""
        return _is_neon(self.url.host or "")

    def direct(self) -> Target:
        """Return the target with Neon's direct host instead of its pooled one, for migrations."""
        host = self.url.host or ""
        if not (self.is_neon and "-pooler." in host):
            return self
        return replace(
            self, url=self.url.set(host=host.replace("-pooler.", ".", 1)), is_pooled=False
        )


def _is_neon(host: str) -> bool:
    return host.lower().endswith((".neon.tech", ".neon.build"))


def parse(text: str, ssl_mode: str | None = None, *, prepared_statements: str = "auto") -> Target:
    """Parse a connection string.

    Args:
        text: For example `postgresql://user:password@host/database?sslmode=require`.
        ssl_mode: Overrides the string's `sslmode`.
        prepared_statements: `on`, `off` (behind a transaction pooler), or `auto` (off when the
            string shows that there is a pooler).

    Raises:
        ValueError: it is not a PostgreSQL connection string; the message does not contain the
            password.
    """
    url, query = _split(text)
    host = url.host or query.get("host", "")
    is_pgbouncer = query.pop("pgbouncer", "") == "true" or _PGBOUNCER_PORT in (
        str(url.port),
        query.get("port"),
    )
    is_pooled = (
        prepared_statements == "off" or is_pgbouncer or "-pooler." in host or ".pooler." in host
    )
    settings, notes = _server_settings(query, is_pooled=is_pooled)
    mode = query.pop("sslmode", None)
    mode = ssl_mode or mode or ("require" if _is_neon(host) else "prefer")
    if query.pop("channel_binding", "") == "require":
        notes.append(
            "channel_binding=require: the driver has no SCRAM-SHA-256-PLUS; the server is "
            "authenticated by its TLS certificate instead"
            if _is_neon(host) or mode == "verify-full"
            else "channel_binding=require is not supported and ignored: set sslmode=verify-full to "
            "authenticate the server"
        )
    connect_args: dict[str, Any] = {"ssl": _ssl(mode, host, query), "server_settings": settings}
    if timeout_s := _seconds(query.pop("connect_timeout", "0")):
        connect_args["timeout"] = timeout_s
    if is_pooled and prepared_statements != "on":
        connect_args |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    # SQLAlchemy passes these two on, such as the folder of a socket.
    address_options: dict[str, str] = {
        key: query.pop(key) for key in ("host", "port") if key in query
    }
    notes += [f"{key} in the database URL is not supported and ignored" for key in sorted(query)]
    return Target(
        url.set(drivername="postgresql+asyncpg", query=address_options),
        connect_args,
        is_pooled,
        mode,
        tuple(notes),
    )


def _split(text: str) -> tuple[URL, dict[str, str]]:
    """Split a string into its URL, with user, password and database, and the other options.

    Raises:
        ValueError: as `parse`. The message quotes no part of the string, which may belong to the
            password.
    """
    match = _CONNECTION_STRING.fullmatch(text.strip())
    try:
        url = make_url(match[2] if match else "")
        backend = url.get_backend_name()
    except (ArgumentError, ValueError):
        raise ValueError(
            "the database URL is not of the form postgresql://user:password@host/database with one "
            "host; in user and password, characters such as : / @ # ? % must be written as "
            "%3A %2F %40 %23 %3F %25"
        ) from None
    if backend not in ("postgresql", "postgres"):
        raise ValueError(f"the database URL is for {backend}, and only postgresql:// is supported")
    if re.search(r"[@/?#\s]", url.host or ""):
        raise ValueError("in the database URL, write an @ of the password as %40")
    query = {
        key: value if isinstance(value, str) else value[-1] for key, value in url.query.items()
    }
    url = url.set(
        username=query.pop("user", url.username),
        password=query.pop("password", url.password),
        database=query.pop("dbname", url.database),
    )
    if "port" in query and not query["port"].isdecimal():
        raise ValueError("port in the database URL is not a number")
    return url, query


def _seconds(text: str) -> float:
    if not text.isdecimal():
        raise ValueError("connect_timeout in the database URL is not a whole number of seconds")
    return float(text)


def _server_settings(query: dict[str, str], *, is_pooled: bool) -> tuple[dict[str, str], list[str]]:
    """Remove the start-up parameters from the query and return those that the server takes."""
    settings: dict[str, str] = {"application_name": query.pop("application_name", "chat-history")}
    notes: list[str] = []
    # -c name=value, -cname=value or --name=value, or a bare name for Neon's own.
    for option in re.sub(r"(^|\s)-c\s*", " ", query.pop("options", "")).split():
        name, _, value = option.removeprefix("--").partition("=")
        if name in ("endpoint", "project"):
            continue  # Neon's name of the compute, for clients without SNI; asyncpg sends SNI.
        if name and value:
            settings[name.replace("-", "_")] = value
    if is_pooled and len(settings) > 1:
        notes.append(
            "options in the database URL are ignored: a pooler rejects start-up parameters"
        )
        settings = {"application_name": settings["application_name"]}
    if is_pooled:
        # PostgreSQL's own spelling: PgBouncer takes asyncpg's spelling for a different encoding,
        # and sets that before each transaction.
        settings["client_encoding"] = "UTF8"
    return settings, notes


def _ssl(mode: str, host: str, query: dict[str, str]) -> ssl.SSLContext | str | bool:
    """Return asyncpg's `ssl` argument for libpq's options, which are removed from the query.

    Raises:
        ValueError: the mode is unknown, or a certificate file cannot be read.
    """
    if mode not in _SSL_MODES:
        raise ValueError(f"sslmode in the database URL is not one of {', '.join(_SSL_MODES)}")
    if host.startswith("/") or not host or mode == "disable":
        return False
    if mode in ("allow", "prefer"):
        return mode
    root = query.pop("sslrootcert", None)
    is_verified = mode in ("verify-ca", "verify-full") or root is not None or _is_neon(host)
    try:
        context = ssl.create_default_context(cafile=None if root == "system" else root)
        if "sslcert" in query:
            context.load_cert_chain(query.pop("sslcert"), query.pop("sslkey", None))
    except OSError as error:
        raise ValueError(
            f"a certificate file of the database URL cannot be read: {error.strerror}"
        ) from None
    # libpq's `require` does not verify the certificate unless there is a root certificate. Neon's
    # certificates are always public ones, so there they are verified.
    context.check_hostname = (
        is_verified and mode != "verify-ca" and (mode == "verify-full" or _is_neon(host))
    )
    if not is_verified:
        context.verify_mode = ssl.CERT_NONE
    return context
