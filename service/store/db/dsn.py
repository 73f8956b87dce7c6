"""Parses connection strings in the forms of libpq and of Neon's console.

asyncpg takes neither `sslmode` nor `channel_binding`, among others; they are translated here.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# Bare, in quotes, or as the command that consoles offer: psql 'postgresql://…'.
_CONNECTION_STRING = re.compile(r"""(?:psql\s+)?(['"]?)(\S.*?)\1""", re.DOTALL)
# The three parts of a URL, divided as SQLAlchemy does. Its own parser takes only one host.
_URL = re.compile(
    r"(?P<start>[\w+]+://(?:[^:/]*(?::[^@]*)?@)?)(?P<hosts>[^/?]*)(?P<rest>.*)", re.DOTALL
)
# libpq's other form: host=a,b port=5432 dbname='my database'.
_PAIRS = re.compile(r"\s*\w+\s*=")
_PAIR = re.compile(
    r"\s*(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|(?!')((?:[^\s\\]|\\.)*))(?=\s|$)", re.DOTALL
)
_FORM = (
    "the database URL is not of the form postgresql://user:password@host/database or "
    "postgresql://user:password@host1:port1,host2:port2/database; in user and password, characters "
    "such as : / @ # ? % must be written as %3A %2F %40 %23 %3F %25"
)
_MALFORMED_HOST = "a host in the database URL is malformed; an IPv6 address must be in brackets"
_DEFAULT_PORT, _PGBOUNCER_PORT, _MAX_PORT = 5432, 6432, 65535

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


class Address(NamedTuple):
    """The address of one server."""

    host: str
    """A name, an IP address, or the folder of a Unix socket."""
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


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
        return any(_is_neon(address.host) for address in self.addresses)

    def direct(self) -> Target:
        """Return the target with Neon's direct hosts instead of its pooled ones, for migrations."""
        host = self.url.host or ""
        if not (self.is_neon and "-pooler." in host):
            return self
        return replace(
            self,
            url=self.url.set(host=_direct_host(host)),
            addresses=tuple(
                address._replace(host=_direct_host(address.host)) for address in self.addresses
            ),
            is_pooled=False,
        )


def _is_neon(host: str) -> bool:
    return host.lower().endswith((".neon.tech", ".neon.build"))


def _direct_host(host: str) -> str:
    return host.replace("-pooler.", ".", 1)


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
    url, query, addresses = _split(text)
    hosts = [address.host for address in addresses]
    is_neon = any(map(_is_neon, hosts))
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
    notes: list[str] = []
    session_attrs = _session_attrs(query, is_replica=is_replica)
    mode = query.pop("sslmode", None)
    mode = ssl_mode or mode or ("require" if is_neon else "prefer")
    if query.pop("channel_binding", "") == "require":
        notes.append(
            "channel_binding=require: the driver has no SCRAM-SHA-256-PLUS; the server is "
            "authenticated by its TLS certificate instead"
            if is_neon or mode == "verify-full"
            else "channel_binding=require is not supported and ignored: set sslmode=verify-full to "
            "authenticate the server"
        )
    connect_args: dict[str, Any] = {
        "ssl": _ssl(mode, hosts, query, is_neon=is_neon),
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


def _split(text: str) -> tuple[URL, dict[str, str], tuple[Address, ...]]:
    """Split a string into its URL, with user, password and database, other options, and servers.

    Raises:
        ValueError: as `parse`. The message quotes no part of the string, which may belong to the
            password.
    """
    match = _CONNECTION_STRING.fullmatch(text.strip())
    text = match[2] if match else ""
    if _PAIRS.match(text):
        url, hosts, options = URL.create("postgresql"), "", _read_pairs(text)
    else:
        url, hosts, options = _read_url(text)
    is_encoded = "host" not in options
    hosts = options.pop("host", "") or hosts or options.pop("hostaddr", "")
    addresses = _addresses(hosts, options.pop("port", ""), is_encoded=is_encoded)
    first = addresses[0]
    port = None if first.port == _DEFAULT_PORT else first.port
    # SQLAlchemy takes the folder of a socket as an option only.
    socket_options: dict[str, str] = {}
    if first.host.startswith("/"):
        socket_options = {"host": first.host} | ({"port": str(port)} if port else {})
    url = url.set(
        username=options.pop("user", url.username),
        password=options.pop("password", url.password),
        database=options.pop("dbname", url.database),
        host=None if socket_options else first.host or None,
        port=None if socket_options else port,
        query=socket_options,
    )
    return url, options, addresses if first.host else ()


def _read_url(text: str) -> tuple[URL, str, dict[str, str]]:
    """Return a URL without its hosts, the encoded list of hosts, and the options."""
    parts = _URL.fullmatch(text)
    try:
        url = make_url(f"{parts['start']}{parts['rest']}" if parts else "")
        backend = url.get_backend_name()
    except (ArgumentError, ValueError):
        raise ValueError(_FORM) from None
    if backend not in ("postgresql", "postgres"):
        raise ValueError(f"the database URL is for {backend}, and only postgresql:// is supported")
    hosts = parts["hosts"] if parts else ""
    if re.search(r"[@#\s]", hosts):
        raise ValueError("in the database URL, write an @ of the password as %40")
    options: dict[str, str] = {}
    for key, value in url.query.items():
        if isinstance(value, str):
            options[key] = value
        else:  # Repeated: SQLAlchemy and asyncpg write several hosts so.
            options[key] = ",".join(value) if key in ("host", "port") else value[-1]
    return url, hosts, options


def _read_pairs(text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    position = 0
    while text[position:].strip():
        match = _PAIR.match(text, position)
        if match is None:
            raise ValueError(_FORM)
        value = match[2] if match[2] is not None else match[3]
        options[match[1]] = re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)
        position = match.end()
    return options


def _addresses(hosts: str, ports: str, *, is_encoded: bool) -> tuple[Address, ...]:
    """Return the servers of a list of hosts, at least one.

    Args:
        hosts: Such as `a,b`, or with ports, `a:1,b:2`. A single host may be empty.
        ports: Ports that replace those of the list: one for all hosts, or one for each.
        is_encoded: Whether the hosts are percent-encoded.

    Raises:
        ValueError: a host or port is malformed, or there are more or fewer ports than hosts.
    """
    pairs = [_host_and_port(entry) for entry in hosts.split(",")]
    numbers = ports.split(",") if ports else [port for _, port in pairs]
    if len(numbers) == 1:
        numbers *= len(pairs)
    if len(numbers) != len(pairs):
        raise ValueError("the database URL must have one port, or one for each host")
    default_host = "localhost" if len(pairs) > 1 else ""
    return tuple(
        Address((unquote(host) if is_encoded else host) or default_host, _port(number))
        for (host, _), number in zip(pairs, numbers, strict=True)
    )


def _host_and_port(entry: str) -> tuple[str, str]:
    """Split an entry of a list of hosts: `h`, `h:5432`, `[::1]:5432`, `::1`, or a folder."""
    if entry.startswith("["):
        host, bracket, port = entry[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ValueError(_MALFORMED_HOST)
        return host, port[1:]
    if entry.startswith("/"):
        return entry, ""
    host, _, port = entry.partition(":")
    if ":" not in port:
        return host, port
    try:
        ipaddress.IPv6Address(entry.partition("%")[0])
    except ValueError:
        raise ValueError(_MALFORMED_HOST) from None
    return entry, ""


def _port(number: str) -> int:
    if not number:
        return _DEFAULT_PORT
    if not (number.isdecimal() and 0 < int(number) <= _MAX_PORT):
        raise ValueError(f"a port in the database URL is not a number from 1 to {_MAX_PORT}")
    return int(number)


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


def _ssl(
    mode: str, hosts: Sequence[str], query: dict[str, str], *, is_neon: bool
) -> ssl.SSLContext | str | bool:
    """Return the `ssl` argument of connections for libpq's options, which leave the query.

    Raises:
        ValueError: the mode is unknown, or a certificate file cannot be read.
    """
    if mode not in _SSL_MODES:
        raise ValueError(f"sslmode in the database URL is not one of {', '.join(_SSL_MODES)}")
    if all(host.startswith("/") for host in hosts) or mode == "disable":
        return False
    if mode in ("allow", "prefer"):
        return mode
    root = query.pop("sslrootcert", None)
    is_verified = mode in ("verify-ca", "verify-full") or root is not None or is_neon
    try:
        context = ssl.create_default_context(cafile=None if root == "system" else root)
        if "sslcert" in query:
            context.load_cert_chain(
                query.pop("sslcert"), query.pop("sslkey", None), query.pop("sslpassword", None)
            )
    except OSError as error:
        raise ValueError(
            f"a certificate file of the database URL cannot be read: {error.strerror}"
        ) from None
    # libpq's `require` does not verify the certificate unless there is a root certificate. Neon's
    # certificates are always public ones, so there they are verified.
    context.check_hostname = (
        is_verified and mode != "verify-ca" and (mode == "verify-full" or is_neon)
    )
    if not is_verified:
        context.verify_mode = ssl.CERT_NONE
    return context
