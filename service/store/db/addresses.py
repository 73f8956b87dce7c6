"""The addresses of servers in a connection string."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple
from urllib.parse import unquote

DEFAULT_PORT = 5432
_MAX_PORT = 65535
_MALFORMED_HOST = "a host in the database URL is malformed; an IPv6 address must be in brackets"


class Address(NamedTuple):
    """The address of one server."""

    host: str
    """A name, an IP address, or the folder of a Unix socket."""
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_neon(host: str) -> bool:
    """Return whether a host is one of Neon's."""
    return host.lower().endswith((".neon.tech", ".neon.build"))


def is_pooled_neon(host: str) -> bool:
    """Return whether a host is Neon's name of a transaction pooler."""
    return is_neon(host) and "-pooler." in host


def direct_host(host: str) -> str:
    """Return Neon's direct host for its pooled one."""
    return host.replace("-pooler.", ".", 1)


def parse_addresses(hosts: str, ports: str, *, is_encoded: bool) -> tuple[Address, ...]:
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
        return DEFAULT_PORT
    if not (number.isdecimal() and 0 < int(number) <= _MAX_PORT):
        raise ValueError(f"a port in the database URL is not a number from 1 to {_MAX_PORT}")
    return int(number)
