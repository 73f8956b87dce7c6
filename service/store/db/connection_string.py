"""Splits connection strings, in the forms of libpq and of Neon's console, into their parts."""

from __future__ import annotations

import re
from typing import NamedTuple

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from service.store.db.addresses import DEFAULT_PORT, Address, parse_addresses

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


class ConnectionString(NamedTuple):
    """The parts of a connection string."""

    url: URL
    """User, password, database and the first server, as SQLAlchemy expects them."""
    options: dict[str, str]
    """The other options."""
    addresses: tuple[Address, ...]
    """The servers in the order of the string. Empty: the driver's default socket."""


def split(text: str) -> ConnectionString:
    """Split a connection string.

    Raises:
        ValueError: it is not one of PostgreSQL. The message quotes no part of the string, which may
            belong to the password.
    """
    match = _CONNECTION_STRING.fullmatch(text.strip())
    text = match[2] if match else ""
    if _PAIRS.match(text):
        url, hosts, options = URL.create("postgresql"), "", _read_pairs(text)
    else:
        url, hosts, options = _read_url(text)
    is_encoded = "host" not in options
    hosts = options.pop("host", "") or hosts or options.pop("hostaddr", "")
    addresses = parse_addresses(hosts, options.pop("port", ""), is_encoded=is_encoded)
    first = addresses[0]
    port = None if first.port == DEFAULT_PORT else first.port
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
    return ConnectionString(url, options, addresses if first.host else ())


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
