"""gRPC channels: their options, and a pool that adds channels as streams need them."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import aio

if TYPE_CHECKING:
    from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceAsyncStub

    Stub = ChatHistoryServiceAsyncStub
else:  # The asynchronous class exists for type checkers only.
    Stub = ChatHistoryServiceStub

MAX_STREAMS_PER_CHANNEL = 100
"""Open streams on one connection. The service and most proxies limit the calls on a connection."""

_SERVICE = "chathistory.v1.ChatHistoryService"
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            # Safe for writes too: their ids are created before the first attempt.
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # Stops the retries while most calls fail, so that they do not add to an overload.
    "retryThrottling": {"maxTokens": 200, "tokenRatio": 0.5},
}
DEFAULT_OPTIONS: Mapping[str, int | str] = {
    "grpc.service_config": json.dumps(_SERVICE_CONFIG),
    "grpc.enable_retries": 1,
    # gRPC does not retry a request that exceeds this buffer. The service accepts up to 4 MiB.
    "grpc.per_rpc_retry_buffer_size": 5 * 1024 * 1024,
    # The service allows one ping every 10 s.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    # The option that takes effect. With keepalive_timeout_ms alone, a dead connection was detected
    # only after 90 s (grpcio 1.85).
    "grpc.http2.ping_timeout_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
    # Reconnect within seconds of a restart. By default, gRPC waits up to two minutes.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 3_000,
    "grpc.max_reconnect_backoff_ms": 2_000,
    "grpc.dns_min_time_between_resolutions_ms": 5_000,
    # Replies stop at 3 MiB today. A later version of the service may allow more.
    "grpc.max_receive_message_length": 64 * 1024 * 1024,
}


@dataclass(frozen=True)
class Tls:
    """TLS settings of a client. Certificates and keys are PEM bytes."""

    root_certificates: bytes | None = None
    """Certificates to verify the server with. None for the public certificate authorities."""
    private_key: bytes | None = None
    """Private key of the client, for mutual TLS."""
    certificate_chain: bytes | None = None
    """Certificate chain of the client, for mutual TLS."""
    server_name: str | None = None
    """Name to expect in the server's certificate, if it differs from the target's."""


@dataclass
class _PooledChannel:
    channel: aio.Channel
    stub: Stub
    stream_count: int = 0


class ChannelPool:
    """Channels to one target. The first one opens at the first call, in that call's event loop.

    Unary calls share the first channel. Streams use it too, up to `MAX_STREAMS_PER_CHANNEL`; more
    streams open further channels, each with a connection of its own.
    """

    def __init__(self, target: str, tls: Tls | None, options: Mapping[str, int | str]) -> None:
        self._target = _with_scheme(target)
        self._tls = tls
        self._options = options
        self._channels: list[_PooledChannel] = []
        self.is_closed = False

    async def close(self) -> None:
        """Close all channels and cancel their calls. The pool cannot be opened again."""
        self.is_closed = True
        for pooled in self._channels:
            await pooled.channel.close(None)

    @property
    def channel(self) -> aio.Channel:
        """The channel for unary calls."""
        return self._first().channel

    @property
    def stub(self) -> Stub:
        """The stub for unary calls."""
        return self._first().stub

    @contextmanager
    def stream_slot(self) -> Generator[Stub]:
        """Reserve room for one stream, and give the stub to open it with.

        Raises:
            RuntimeError: The client is closed.
        """
        self._first()
        with_room = (
            pooled for pooled in self._channels if pooled.stream_count < MAX_STREAMS_PER_CHANNEL
        )
        pooled = next(with_room, None) or self._open()
        pooled.stream_count += 1
        try:
            yield pooled.stub
        finally:
            pooled.stream_count -= 1

    def _first(self) -> _PooledChannel:
        return self._channels[0] if self._channels and not self.is_closed else self._open()

    def _open(self) -> _PooledChannel:
        if self.is_closed:
            raise RuntimeError("the client is closed")
        channel = self._create_channel()
        pooled = _PooledChannel(channel, ChatHistoryServiceStub(channel))
        self._channels.append(pooled)
        return pooled

    def _create_channel(self) -> aio.Channel:
        options = list(self._options.items())
        if self._channels:
            # Channels to one target share their connections by default.
            options.append(("grpc.use_local_subchannel_pool", 1))
        if self._tls is None:
            return aio.insecure_channel(self._target, options)
        if self._tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self._tls.server_name))
        credentials = grpc.ssl_channel_credentials(
            self._tls.root_certificates, self._tls.private_key, self._tls.certificate_chain
        )
        return aio.secure_channel(self._target, credentials, options)


def _with_scheme(target: str) -> str:
    """Return a target of gRPC's DNS resolver, so that all addresses of the name share the calls."""
    if "://" in target or target.startswith(("unix:", "ipv4:", "ipv6:")):
        return target
    return f"dns:///{target}"


def is_local(target: str) -> bool:
    """Whether a target is on this machine."""
    address = target.rpartition("/")[2]
    return target.startswith("unix:") or address.startswith(
        ("127.", "localhost:", "[::1]:", "ipv4:127.")
    )
