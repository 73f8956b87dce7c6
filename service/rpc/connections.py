"""Closes TCP connections, for which gRPC has no interface: at shutdown, and those that do harm.

A stopping gRPC server sends GOAWAY and answers the calls that cross it on the wire with CANCELLED,
which clients do not retry. A closed connection is reported as UNAVAILABLE, which clients retry,
possibly on another replica.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from urllib.parse import unquote

_TCP_INFO = struct.Struct("=B51xI")
"""The fields `tcpi_state` and `tcpi_last_data_recv` of Linux's `struct tcp_info`."""
_ESTABLISHED = 1

_Name = tuple[str, int]
"""The address and the port of the other end of a connection."""


def close_connections(port: int) -> None:
    """Stop accepting connections on a TCP port, and close those that were accepted there.

    Data that was already written is still delivered. On platforms without /dev/fd, and for
    listeners outside Linux, nothing happens, and gRPC closes the connections in its own way.
    """
    # Listeners first: a client whose connection is closed reconnects immediately, and gRPC stops
    # listening only a moment later. On Linux SHUT_RD makes a listener refuse connections. gRPC then
    # logs "Closing acceptor. Failed accept4", which is expected at this point.
    for how, is_listener in ((socket.SHUT_RD, True), (socket.SHUT_RDWR, False)):
        for sock in _sockets(lambda sock: _is_of_port(sock, port)):
            if _is_listening(sock) == is_listener:
                with suppress(OSError):
                    sock.shutdown(how)


def close_peers(port: int, peers: Iterable[str]) -> None:
    """Close the connections of some peers that were accepted on a TCP port.

    Args:
        port: The port.
        peers: gRPC's names of the connections, such as `ipv4:127.0.0.1:40000`.
    """
    _close(port, {_name(peer) for peer in peers})


def close_excess(port: int, per_address: int) -> dict[str, int]:
    """Close the connections of addresses that have too many on a TCP port.

    Those that have received nothing for the longest time are closed first.

    Returns:
        The number of connections that were closed, by address.
    """
    by_address: dict[str, list[tuple[int, _Name]]] = defaultdict(list)
    for sock in _sockets(lambda sock: _is_of_port(sock, port) and not _is_listening(sock)):
        peer, silent_ms = _peer(sock), _silent_ms(sock)
        if peer is not None and silent_ms is not None:
            by_address[peer[0]].append((silent_ms, peer))
    excess = {
        peer
        for connections in by_address.values()
        for _, peer in sorted(connections, key=itemgetter(0))[per_address:]
    }
    return Counter(address for address, _ in _close(port, excess)) if excess else {}


def _close(port: int, names: Collection[_Name]) -> list[_Name]:
    """Close the connections of peers on a port, and return those that were still open."""
    closed: list[_Name] = []
    for sock in _sockets(lambda sock: _is_of_port(sock, port)):
        peer = _peer(sock)
        if peer is not None and peer in names:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
                closed.append(peer)
    return closed


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _is_of_port(sock: socket.socket, port: int) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6) and int(sock.getsockname()[1]) == port


def _silent_ms(sock: socket.socket) -> int | None:
    """Return the time since the last data were received, in milliseconds; 0 if it is unknown.

    None if the connection is being closed.
    """
    with suppress(AttributeError, OSError, struct.error):  # Linux only.
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        state, silent_ms = _TCP_INFO.unpack(info)
        return int(silent_ms) if state == _ESTABLISHED else None
    return 0


def _name(peer: str) -> _Name:
    """Return the address and the port in gRPC's name of a connection, which `_peer` returns too."""
    address, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return _canonical(address.strip("[]")), int(port)


def _peer(sock: socket.socket) -> _Name | None:
    """Return the address and the port of the other end; None without one."""
    try:
        address, port, *_ = sock.getpeername()
    except OSError:
        return None
    return _canonical(address), int(port)


def _canonical(address: str) -> str:
    """Return an address in one form, also if it is an IPv4 address inside IPv6."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def _sockets(is_wanted: Callable[[socket.socket], bool]) -> Iterator[socket.socket]:
    """Yield duplicates of the sockets of this process that are wanted.

    Each is closed before the next one: together they could exhaust the process's descriptors.
    """
    with suppress(OSError):
        for descriptor in list(Path("/dev/fd").iterdir()):
            with suppress(OSError):
                if descriptor.is_socket():
                    # A duplicate, because gRPC may close its descriptor at any time, and the number
                    # may then be reused.
                    duplicate = os.dup(int(descriptor.name))
                    try:
                        sock = socket.socket(fileno=duplicate)
                    except OSError:  # The number belongs to something else now.
                        os.close(duplicate)
                        continue
                    with sock:
                        try:
                            wanted = is_wanted(sock)
                        except OSError:
                            wanted = False
                        if wanted:
                            yield sock
