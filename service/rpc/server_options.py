"""Channel arguments of the gRPC servers: size limits, keepalive and connection behaviour."""

from __future__ import annotations

from service.rpc.request_parser import MAX_REQUEST_BYTES

MAX_METADATA_BYTES = 16 * 1024
MAX_PENDING_CALLS = 8192

SERVER_OPTIONS = [
    # Requests of up to twice the limit are read, so that they can be rejected with a reason. gRPC
    # rejects larger ones without one.
    ("grpc.max_receive_message_length", 2 * MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES // 2),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # One process for each port: a second process must fail to start instead of silently receiving
    # half of the connections.
    ("grpc.so_reuseport", 0),
    # Calls that gRPC has received and the service has not yet accepted. Above gRPC's default of
    # 1,000 it ends some of them with CANCELLED, which clients do not retry, whereas admission
    # rejects them with a reason. This limit only bounds memory.
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING_CALLS),
    # If this is on, finished streams count until their memory is released, and under load calls
    # within the limit are rejected with REFUSED_STREAM.
    ("grpc.http.overload_protection", 0),
    # Must be below the clients' ping interval. Otherwise their pings cause GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # The effective setting in current versions of gRPC: time without a reply to a ping after which
    # the connection is closed (default 60 s).
    ("grpc.http2.ping_timeout_ms", 20_000),
]
