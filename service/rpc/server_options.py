"""Channel arguments of the gRPC servers: size limits, keepalive and connection behaviour."""

from __future__ import annotations

import resource

from service.rpc.request_parser import MAX_REQUEST_BYTES

MAX_METADATA_BYTES = 16 * 1024
MAX_PENDING_CALLS = 8192
MAX_DEALLOCATING_STREAMS = 1000
"""Finished calls of a connection whose memory is not released yet."""
WINDOW_BYTES = 64 * 1024
"""Bytes of a request that a client may send before the service reads it."""

HANDSHAKE_TIMEOUT_S = 15.0
"""Time from a connection's first byte to the end of its TLS and HTTP/2 handshakes."""
IDLE_TIMEOUT_S = 600.0
"""Time without a call after which a connection is closed. Clients reconnect at the next call."""

_MAX_SHARE_OF_DESCRIPTORS = 0.75
"""The rest of the process's file descriptors is for the database, files and health checks."""

Option = tuple[str, int]


def server_options(
    *,
    max_calls_per_connection: int,
    max_connections: int,
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
) -> list[Option]:
    """Return the options of a server with these limits, for each of its ports."""
    return [
        *SERVER_OPTIONS,
        ("grpc.max_concurrent_streams", max_calls_per_connection),
        ("grpc.max_allowed_incoming_connections", connection_count(max_connections)),
        ("grpc.server_handshake_timeout_ms", int(handshake_timeout_s * 1000)),
        ("grpc.max_connection_idle_ms", int(idle_timeout_s * 1000)),
    ]


def connection_count(max_connections: int) -> int:
    """Return how many connections fit into the limit and into the process's descriptors."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft_limit == resource.RLIM_INFINITY:
        return max_connections
    return max(1, min(max_connections, int(soft_limit * _MAX_SHARE_OF_DESCRIPTORS)))


SERVER_OPTIONS: list[Option] = [
    # Requests of up to twice the limit are read, so that they can be rejected with a reason. gRPC
    # rejects larger ones without one.
    ("grpc.max_receive_message_length", 2 * MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES // 2),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # gRPC would otherwise announce windows of 4 MiB and more, and hold that much for each call that
    # waits. While a request is read, its window is as large as the request.
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.http2.bdp_probe", 0),
    # One process for each port: a second process must fail to start instead of silently receiving
    # half of the connections.
    ("grpc.so_reuseport", 0),
    # Calls that gRPC has received and the service has not yet accepted. Above gRPC's default of
    # 1,000 it ends some of them with CANCELLED, which clients do not retry, whereas admission
    # rejects them with a reason. This limit only bounds memory.
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING_CALLS),
    # Finished streams count toward the limit of a connection until their memory is released, which
    # bounds a flood of calls that are reset immediately. Without this headroom, calls within the
    # limit would be rejected with REFUSED_STREAM under load.
    ("grpc.http.overload_protection", 1),
    ("grpc.http2.max_deallocating_streams", MAX_DEALLOCATING_STREAMS),
    # Must be below the clients' ping interval. Otherwise their pings cause GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # The effective setting in current versions of gRPC: time without a reply to a ping after which
    # the connection is closed (default 60 s).
    ("grpc.http2.ping_timeout_ms", 20_000),
]
