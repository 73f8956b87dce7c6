"""Reads connection strings as libpq, and Neon's console, write them; asyncpg takes neither `sslmode` nor `channel_binding`."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


@dataclass(frozen=True)
class Target:
    """Where the database is and how to talk to it."""

    url: URL
    """For SQLAlchemy; holds no option that asyncpg does not know."""
    connect_args: dict[str, Any] = field(repr=False)
    """For `asyncpg.connect`."""
    pooled: bool
    """Whether a transaction pooler stands between: no start-up parameters, no session state, no prepared statements."""
    ssl_mode: str
    """The libpq mode in force."""
    notes: tuple[str, ...] = ()
    """What was changed or left out of the given string, for the log."""

    @property
    def prepared_statements(self) -> bool:
        """Whether statements are prepared and kept by name."""
        return self.connect_args.get("statement_cache_size") != 0

    def direct(self) -> Target:
        """Return Neon's direct host for a pooled one, for migrations; others unchanged."""
        host = self.url.host or ""
        if not (_is_neon(host) and "-pooler." in host):
            return self
        return parse(
            str(self.url.set(host=host.replace("-pooler.", ".", 1)).render_as_string(hide_password=False)),
            self.ssl_mode,
        )


def _is_neon(host: str) -> bool:
    return host.endswith((".neon.tech", ".neon.build"))


def parse(text: str, ssl_mode: str | None = None, *, prepared_statements: str = "auto") -> Target:
    """Read a connection string.

    Args:
        text: `postgresql://user:password@host/database?sslmode=require&channel_binding=require` and the like.
        ssl_mode: Overrides the string's `sslmode`.
        prepared_statements: `on`, `off`, or `auto` (off when the host's name says that it is a pooler).

    Raises:
        ValueError: When it is no PostgreSQL connection string; the text does not hold the password.
    """
    try:
        url = make_url(text.strip().strip("'\""))
    except ArgumentError:
        raise ValueError("the database URL is not of the form postgresql://user:password@host/database") from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError(f"the database URL is for {url.get_backend_name()}, and only postgresql:// is supported")
    query = {key: value if isinstance(value, str) else value[-1] for key, value in url.query.items()}
    host = url.host or query.get("host", "")
    pooled = "-pooler." in host or query.pop("pgbouncer", "") == "true"
    settings, notes = _server_settings(query, pooled=pooled)
    mode = ssl_mode or query.pop("sslmode", None) or ("require" if _is_neon(host) else "prefer")
    query.pop("sslmode", None)
    if query.pop("channel_binding", "") == "require":
        notes.append(
            "channel_binding=require: the driver has no SCRAM-SHA-256-PLUS; TLS with a verified certificate instead"
        )
    args: dict[str, Any] = {"ssl": _ssl(mode, host, query.pop("sslrootcert", None), query)}
    if settings:
        args["server_settings"] = settings
    if "connect_timeout" in query:
        args["timeout"] = float(query.pop("connect_timeout"))
    if prepared_statements == "off" or (prepared_statements == "auto" and pooled):
        args |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    keep = {key: query.pop(key) for key in ("host", "port") if key in query}
    notes += [f"{key} in the database URL is not supported and ignored" for key in sorted(query)]
    return Target(url.set(drivername="postgresql+asyncpg", query=keep), args, pooled, mode, tuple(notes))


def _server_settings(query: dict[str, str], *, pooled: bool) -> tuple[dict[str, str], list[str]]:
    """Take start-up parameters out of the query; a pooler refuses them."""
    settings: dict[str, str] = {"application_name": query.pop("application_name", "chat-history")}
    notes: list[str] = []
    for word in unquote(query.pop("options", "")).split():
        name, _, value = word.removeprefix("-c").partition("=")
        if name == "endpoint":
            continue  # Neon's way to name the compute for clients without SNI; asyncpg sends SNI.
        if name and value:
            settings[name] = value
    if pooled and len(settings) > 1:
        notes.append("options in the database URL are left out: a pooler refuses start-up parameters")
        settings = {"application_name": settings["application_name"]}
    return settings, notes


def _ssl(mode: str, host: str, root_cert: str | None, query: dict[str, str]) -> ssl.SSLContext | str | bool:
    """Build what asyncpg takes for `ssl` from libpq's words.

    Raises:
        ValueError: for an unknown mode, or a certificate file that cannot be read.
    """
    if mode not in _SSL_MODES:
        raise ValueError(f"sslmode={mode} is not one of {', '.join(_SSL_MODES)}")
    if host.startswith("/") or not host or mode == "disable":
        return False
    if mode in ("allow", "prefer"):
        return mode
    verify = mode in ("verify-ca", "verify-full") or root_cert is not None or _is_neon(host)
    try:
        context = ssl.create_default_context(cafile=None if root_cert in (None, "system") else root_cert)
        if "sslcert" in query:
            context.load_cert_chain(query.pop("sslcert"), query.pop("sslkey", None))
    except OSError as error:
        raise ValueError(f"a certificate file of the database URL cannot be read: {error.strerror}") from None
    # libpq's `require` encrypts without looking at the certificate, unless a root is given; on Neon it is always public.
    context.check_hostname = verify and mode != "verify-ca" and (mode == "verify-full" or _is_neon(host))
    if not verify:
        context.verify_mode = ssl.CERT_NONE
    return context
