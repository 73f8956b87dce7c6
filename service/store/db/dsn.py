"""Reads connection strings as libpq, and Neon's console, write them; asyncpg takes neither `sslmode` nor `channel_binding`."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# As it is, in quotes, or as the command that consoles offer: psql 'postgresql://…'.
_GIVEN = re.compile(r"""(?:psql\s+)?(['"]?)(\S.*?)\1""", re.DOTALL)
_PGBOUNCER_PORT = "6432"


@dataclass(frozen=True)
class Target:
    """Where the database is and how to talk to it."""

    url: URL
    """For SQLAlchemy; holds no option that asyncpg does not know."""
    connect_args: dict[str, Any] = field(repr=False)
    """For `asyncpg.connect`."""
    is_pooled: bool
    """Whether a transaction pooler stands between: no start-up parameters, no session state, no prepared statements."""
    ssl_mode: str
    """The libpq mode in force."""
    notes: tuple[str, ...] = ()
    """What was changed or left out of the given string, for the log."""

    @property
    def prepared_statements(self) -> bool:
        """Whether statements are prepared and kept by name."""
        return self.connect_args.get("statement_cache_size") != 0

    @property
    def location(self) -> str:
        """Host and database, to be shown."""
        host = self.url.host or str(self.url.query.get("host", ""))
        if not host or host.startswith("/"):
            return f"the socket in {host}" if host else "the local socket"
        port = f":{self.url.port}" if self.url.port else ""
        return f"{host}{port}/{self.url.database or ''}"

    @property
    def is_neon(self) -> bool:
        """Whether it is one of Neon's, which suspends what is idle."""
        return _is_neon(self.url.host or "")

    def direct(self) -> Target:
        """Return Neon's direct host for a pooled one, for migrations; others unchanged."""
        host = self.url.host or ""
        if not (self.is_neon and "-pooler." in host):
            return self
        return replace(
            self, url=self.url.set(host=host.replace("-pooler.", ".", 1)), is_pooled=False
        )


def _is_neon(host: str) -> bool:
    return host.lower().endswith((".neon.tech", ".neon.build"))


def parse(text: str, ssl_mode: str | None = None, *, prepared_statements: str = "auto") -> Target:
    """Read a connection string.

    Args:
        text: `postgresql://user:password@host/database?sslmode=require&channel_binding=require` and the like.
        ssl_mode: Overrides the string's `sslmode`.
        prepared_statements: `on`, `off` (a transaction pooler stands between), or `auto` (off when the string shows that it does).

    Raises:
        ValueError: When it is no PostgreSQL connection string; the text does not hold the password.
    """
    url, query = _split(text)
    host = url.host or query.get("host", "")
    bouncer = query.pop("pgbouncer", "") == "true" or _PGBOUNCER_PORT in (
        str(url.port),
        query.get("port"),
    )
    pooled = prepared_statements == "off" or bouncer or "-pooler." in host or ".pooler." in host
    settings, notes = _server_settings(query, pooled=pooled)
    given = query.pop("sslmode", None)
    mode = ssl_mode or given or ("require" if _is_neon(host) else "prefer")
    if query.pop("channel_binding", "") == "require":
        notes.append(
            "channel_binding=require: the driver has no SCRAM-SHA-256-PLUS; TLS with a verified certificate instead"
            if _is_neon(host) or mode == "verify-full"
            else "channel_binding=require is not supported and ignored: set sslmode=verify-full to know the server for certain"
        )
    args: dict[str, Any] = {"ssl": _ssl(mode, host, query), "server_settings": settings}
    if timeout := _seconds(query.pop("connect_timeout", "0")):
        args["timeout"] = timeout
    if pooled and prepared_statements != "on":
        args |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    keep: dict[str, str] = {key: query.pop(key) for key in ("host", "port") if key in query}
    notes += [f"{key} in the database URL is not supported and ignored" for key in sorted(query)]
    return Target(
        url.set(drivername="postgresql+asyncpg", query=keep), args, pooled, mode, tuple(notes)
    )


def _split(text: str) -> tuple[URL, dict[str, str]]:
    """Take the string apart, and what libpq allows in either place to its place.

    Raises:
        ValueError: as `parse`. What stands in the string is not repeated, as it may be a piece of the password.
    """
    match = _GIVEN.fullmatch(text.strip())
    try:
        url = make_url(match[2] if match else "")
        backend = url.get_backend_name()
    except (ArgumentError, ValueError):
        raise ValueError(
            "the database URL is not of the form postgresql://user:password@host/database with one host; in user and password, "
            "characters such as : / @ # ? % must be written as %3A %2F %40 %23 %3F %25"
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


def _server_settings(query: dict[str, str], *, pooled: bool) -> tuple[dict[str, str], list[str]]:
    """Take start-up parameters out of the query; a pooler refuses them."""
    settings: dict[str, str] = {"application_name": query.pop("application_name", "chat-history")}
    notes: list[str] = []
    # -c name=value, -cname=value or --name=value, and a bare name for Neon's own.
    for word in re.sub(r"(^|\s)-c\s*", " ", query.pop("options", "")).split():
        name, _, value = word.removeprefix("--").partition("=")
        if name in ("endpoint", "project"):
            continue  # Neon's way to name the compute for clients without SNI; asyncpg sends SNI.
        if name and value:
            settings[name.replace("-", "_")] = value
    if pooled and len(settings) > 1:
        notes.append(
            "options in the database URL are left out: a pooler refuses start-up parameters"
        )
        settings = {"application_name": settings["application_name"]}
    if pooled:
        # As PostgreSQL spells it: PgBouncer takes asyncpg's own spelling for another encoding, and sets it before each transaction.
        settings["client_encoding"] = "UTF8"
    return settings, notes


def _ssl(mode: str, host: str, query: dict[str, str]) -> ssl.SSLContext | str | bool:
    """Build what asyncpg takes for `ssl` from libpq's words, which are taken out of the query.

    Raises:
        ValueError: for an unknown mode, or a certificate file that cannot be read.
    """
    if mode not in _SSL_MODES:
        raise ValueError(f"sslmode in the database URL is not one of {', '.join(_SSL_MODES)}")
    if host.startswith("/") or not host or mode == "disable":
        return False
    if mode in ("allow", "prefer"):
        return mode
    root = query.pop("sslrootcert", None)
    verify = mode in ("verify-ca", "verify-full") or root is not None or _is_neon(host)
    try:
        context = ssl.create_default_context(cafile=None if root == "system" else root)
        if "sslcert" in query:
            context.load_cert_chain(query.pop("sslcert"), query.pop("sslkey", None))
    except OSError as error:
        raise ValueError(
            f"a certificate file of the database URL cannot be read: {error.strerror}"
        ) from None
    # libpq's `require` encrypts without looking at the certificate, unless a root is given; on Neon it is always public.
    context.check_hostname = (
        verify and mode != "verify-ca" and (mode == "verify-full" or _is_neon(host))
    )
    if not verify:
        context.verify_mode = ssl.CERT_NONE
    return context
