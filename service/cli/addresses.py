"""The addresses that the service listens on, and why one of them cannot be used."""

from __future__ import annotations

import errno
import socket
from typing import NamedTuple

from service.config import PREFIX, Settings, split_address

_REASONS = {
    errno.EADDRINUSE: "is in use",
    errno.EACCES: "requires privileges that this user lacks",
    errno.EADDRNOTAVAIL: "is not an address of this machine",
}


def addresses(settings: Settings) -> dict[str, str]:
    """Return the addresses of the configuration, by the names of their settings."""
    names = ("listen", "health_listen", "metrics_listen")
    values = {f"{PREFIX}{name.upper()}": getattr(settings, name) for name in names}
    return {name: address for name, address in values.items() if address is not None}


class AddressProblem(NamedTuple):
    """Why an address cannot be used, and what to do."""

    message: str
    is_in_use: bool = False
    """Whether it is in use, perhaps by the service itself."""


def explain(error: OSError, settings: Settings) -> str | None:
    """Return which address cannot be listened on, and what to do; None for another error."""
    if error.errno not in _REASONS:
        return None
    address = error.filename or settings.listen
    names = {value: name for name, value in addresses(settings).items()}
    return _describe(error, address, names.get(address, f"{PREFIX}LISTEN"))


def _describe(error: OSError, address: str, setting: str) -> str:
    reason = _REASONS.get(error.errno or 0, f"cannot be used ({error.strerror})")
    stop = "stop the process that uses it, or " if error.errno == errno.EADDRINUSE else ""
    return f"{address} {reason}: {stop}set {setting} to another address"


def find_problems(settings: Settings) -> list[AddressProblem]:
    """Return the problems of the addresses. One with port 0 has none."""
    problems = []
    names: dict[str, str] = {}
    for setting, address in addresses(settings).items():
        host, port = split_address(address)
        if not port:
            continue
        other = names.setdefault(address, setting)
        if other != setting:
            message = f"{other} and {setting} are both {address}: set one to another address"
            problems.append(AddressProblem(message))
            continue
        try:
            _try_to_bind(host, port)
        except OSError as error:
            is_in_use = error.errno == errno.EADDRINUSE
            problems.append(AddressProblem(_describe(error, address, setting), is_in_use))
    return problems


def _try_to_bind(host: str, port: int) -> None:
    """Bind a socket to an address, as the service does when it starts.

    Raises:
        OSError: the address cannot be listened on.
    """
    [(family, kind, _, _, address), *_] = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    with socket.socket(family, kind) as trial:
        # Connections of the last process on the port may linger.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(address)
