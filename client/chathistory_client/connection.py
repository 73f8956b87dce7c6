"""The channel: where it leads, how it is kept, and what every call passes."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import aio

from chathistory_client import errors, tracing
from chathistory_client.tokens import TokenCache, TokenSource

if TYPE_CHECKING:
    from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceAsyncStub

    Stub = ChatHistoryServiceAsyncStub
else:  # The class is there for type checkers alone.
    Stub = ChatHistoryServiceStub

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0
"""Seconds that a call may take, its retries and the wait for a connection included."""
DELETE_TIMEOUT_S = 60.0
"""The same for what erases much."""
EXPORT_TIMEOUT_S = 600.0
"""The same for everything of one user."""
MAX_STREAMS_PER_CHANNEL = 100
"""Open streams on one connection, beyond which the next get another: the service bounds the calls on one, as proxies do."""
DRAIN_RETRY_S = 0.2
"""Seconds between two tries, at the most, while a replica shuts down; gRPC's own retries may all have met that one."""

Request = TypeVar("Request")
Response = TypeVar("Response")

_SERVICE = "chathistory.v1.ChatHistoryService"
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            # Every write carries ids that were made before the first attempt, so it is safe to repeat.
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # When most calls fail, retries stop making it worse.
    "retryThrottling": {"maxTokens": 200, "tokenRatio": 0.5},
}
_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    # A larger request is never tried again: the whole of what the service takes must fit.
    ("grpc.per_rpc_retry_buffer_size", 5 * 1024 * 1024),
    # The service allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # What decides in fact: with the former alone, a dead connection was noticed after a minute and a half (grpcio 1.85).
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Back soon after the service is; gRPC's own ceiling is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # Replies stop at 3 MiB; a later version of the service may allow more.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
]


@dataclass(frozen=True)
class Tls:
    """How to talk TLS: PEM bytes, None for the public authorities, and the client's own pair for mutual TLS."""

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None
    """The name to look for in the server's certificate, when it is not the target's."""


@dataclass
class _PooledChannel:
    """A channel, and how many streams are open on it."""

    channel: aio.Channel
    stub: Stub
    stream_count: int = 0


class Connection:
    """A channel that opens at the first call, in the loop that makes it."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        tls: Tls | bool = False,
        token: TokenSource | None = None,
        allow_insecure_token: bool = False,
        timeout: float = DEFAULT_TIMEOUT_S,
        wait_for_ready: bool = True,
        options: Sequence[tuple[str, int | str]] = (),
    ) -> None:
        self._target = (
            target
            if "://" in target or target.startswith(("unix:", "ipv4:", "ipv6:"))
            else f"dns:///{target}"
        )
        self._tls = Tls() if tls is True else tls or None
        if (
            token is not None
            and self._tls is None
            and not (allow_insecure_token or _is_local(target))
        ):
            raise ValueError(
                f"a token would travel to {target} in plaintext: use tls, or say allow_insecure_token=True"
            )
        self._tokens = TokenCache(token) if token is not None else None
        self._timeout = timeout
        self._wait_for_ready = wait_for_ready
        self._options = list((dict(_OPTIONS) | dict(options)).items())
        self._channels: list[_PooledChannel] = []
        self._closed = False

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled. A closed client stays closed."""
        self._closed = True
        for pooled in self._channels:
            await pooled.channel.close(None)

    @property
    def _channel(self) -> aio.Channel:
        return self._first_channel().channel

    @property
    def _stub(self) -> Stub:
        return self._first_channel().stub

    def _first_channel(self) -> _PooledChannel:
        return self._channels[0] if self._channels and not self._closed else self._open_channel()

    def _open_channel(self) -> _PooledChannel:
        if self._closed:
            raise RuntimeError("the client is closed")
        channel = self._create_channel()
        pooled = _PooledChannel(channel, ChatHistoryServiceStub(channel))
        self._channels.append(pooled)
        return pooled

    @contextmanager
    def _stream_slot(self) -> Generator[Stub]:
        """Give the stub of a connection that has room for one more stream."""
        pooled = self._first_channel()
        if pooled.stream_count >= MAX_STREAMS_PER_CHANNEL:
            pooled = (
                next(
                    (
                        each
                        for each in self._channels
                        if each.stream_count < MAX_STREAMS_PER_CHANNEL
                    ),
                    None,
                )
                or self._open_channel()
            )
        pooled.stream_count += 1
        try:
            yield pooled.stub
        finally:
            pooled.stream_count -= 1

    def _create_channel(self) -> aio.Channel:
        options = list(self._options)
        if self._channels:
            # Channels to one target would share their connections.
            options.append(("grpc.use_local_subchannel_pool", 1))
        if self._tls is None:
            return aio.insecure_channel(self._target, options)
        if self._tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self._tls.server_name))
        credentials = grpc.ssl_channel_credentials(
            self._tls.root_certificates, self._tls.private_key, self._tls.certificate_chain
        )
        return aio.secure_channel(self._target, credentials, options)

    async def _call(
        self,
        method: aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout: float | None = None,
        default: float | None = None,
    ) -> Response:
        """Make one call: with a deadline, a token and the trace context; its errors come typed."""
        given = (
            timeout if timeout is not None else default if default is not None else self._timeout
        )
        deadline = time.monotonic() + given
        token = await self._get_token(given)
        token_refreshed = False
        drain_error: errors.ChatHistoryError | None = None
        while True:
            try:
                return await method(
                    request,
                    timeout=max(0.0, deadline - time.monotonic()),
                    metadata=_metadata(token),
                    wait_for_ready=self._wait_for_ready,
                )
            except aio.AioRpcError as error:
                failure = errors.from_rpc_error(error)
                if (
                    _rejected_while_draining(failure)
                    and deadline - time.monotonic() > DRAIN_RETRY_S
                ):
                    drain_error = failure if failure.reason else drain_error
                    await asyncio.sleep(random.uniform(DRAIN_RETRY_S / 2, DRAIN_RETRY_S))  # noqa: S311 - no secret
                    continue
                if (
                    drain_error is not None
                    and failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
                    and not failure.reason
                ):
                    raise drain_error from error  # It says more.
                new_token = (
                    None
                    if token_refreshed
                    else await self._refresh_token(failure, token, deadline - time.monotonic())
                )
                if new_token is None:
                    raise failure from error
                token, token_refreshed = new_token, True
            except asyncio.CancelledError:
                self._raise_if_closed()
                raise

    async def _stream(
        self,
        method: Callable[[Stub], aio.UnaryStreamMultiCallable[Request, Response]],
        request: Request,
        token: str,
        timeout: float | None = None,
    ) -> AsyncGenerator[Response]:
        """Open one stream and read it to its end; leaving it early ends the call."""
        with self._stream_slot() as stub:
            call = method(stub)(
                request,
                timeout=timeout,
                metadata=_metadata(token),
                wait_for_ready=self._wait_for_ready,
            )
            try:
                async for reply in call:
                    yield reply
            except aio.AioRpcError as error:
                raise errors.from_rpc_error(error) from error
            except asyncio.CancelledError:
                self._raise_if_closed()
                raise
            finally:
                call.cancel()

    async def _get_token(self, seconds: float) -> str:
        """Return the token to send, empty when none is used."""
        if self._tokens is None:
            return ""
        scope = asyncio.timeout(seconds)
        try:
            async with scope:
                return await self._tokens.get()
        except TimeoutError:
            if not scope.expired():
                raise
            raise errors.DeadlineExceeded(
                "no token came in time", code=grpc.StatusCode.DEADLINE_EXCEEDED
            ) from None

    async def _refresh_token(
        self, failure: errors.ChatHistoryError, rejected: str, seconds: float
    ) -> str | None:
        """Return another token when a call was refused for its token, and there is another one in time."""
        if self._tokens is None or not isinstance(failure, errors.Unauthenticated):
            return None
        scope = asyncio.timeout(max(0.0, seconds))
        try:
            async with scope:
                return await self._tokens.get() if await self._tokens.refresh(rejected) else None
        except TimeoutError:
            if not scope.expired():
                raise
            return None

    def _raise_if_closed(self) -> None:
        """Tell a call that `close` has cut short from a task that was cancelled.

        Raises:
            Unavailable: the client was closed.
        """
        task = asyncio.current_task()
        if self._closed and (task is None or not task.cancelling()):
            raise errors.Unavailable(
                "the client was closed", code=grpc.StatusCode.UNAVAILABLE
            ) from None


def _rejected_while_draining(failure: errors.ChatHistoryError) -> bool:
    """Whether a replica that shuts down has not taken a call: another one will, or the next.

    gRPC itself cancels what reaches a server that stops, or that has too much to take up, and gives no reason.
    """
    return failure.reason == "DRAINING" or (
        failure.code is grpc.StatusCode.CANCELLED and not failure.reason
    )


def _metadata(token: str) -> aio.Metadata:
    made: list[tuple[str, Any]] = list(tracing.headers())
    if token:
        # As metadata and not as call credentials, which gRPC refuses to send in plaintext even to this machine.
        made.append(("authorization", f"Bearer {token}"))
    return aio.Metadata(*made)


def _is_local(target: str) -> bool:
    """Whether a target is on this machine."""
    address = target.rpartition("/")[2]
    return target.startswith("unix:") or address.startswith(
        ("127.", "localhost:", "[::1]:", "ipv4:127.")
    )
