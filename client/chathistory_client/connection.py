"""Calls to the service: deadlines, tokens, retries while a replica drains, and typed errors."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import grpc
from grpc import aio

from chathistory_client import errors, tracing
from chathistory_client.bearer_tokens import TokenCache, TokenSource
from chathistory_client.channels import DEFAULT_OPTIONS, ChannelPool, Tls, is_local

if TYPE_CHECKING:
    from chathistory_client.channels import Stub

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0
"""Time for a call, including its retries and the wait for a connection."""
DELETE_TIMEOUT_S = 60.0
"""The same for deletions, which may cover many rows."""
EXPORT_TIMEOUT_S = 600.0
"""The same for the export of a user."""
DRAIN_RETRY_S = 0.2
"""Maximum pause before a call that a draining replica rejected is sent again.

The client repeats such calls itself, because the retries of gRPC may all reach the same replica.
"""

ReadConsistency = Literal["strong", "eventual"]
"""Whether a read must show every acknowledged change, or may come from a replica that lags."""

Request = TypeVar("Request")
Response = TypeVar("Response")


class Connection:
    """Base of the groups of RPCs: sends calls over a pool of channels."""

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
        tls_settings = Tls() if tls is True else tls or None
        if (
            token is not None
            and tls_settings is None
            and not (allow_insecure_token or is_local(target))
        ):
            raise ValueError(
                f"the token would be sent to {target} in plaintext: "
                "use tls, or pass allow_insecure_token=True"
            )
        self._pool = ChannelPool(target, tls_settings, {**DEFAULT_OPTIONS, **dict(options)})
        self._tokens = TokenCache(token) if token is not None else None
        self._timeout_s = timeout
        self._wait_for_ready = wait_for_ready

    async def close(self) -> None:
        """Close the connections and cancel the calls in flight. The client cannot be used again."""
        await self._pool.close()

    @property
    def _stub(self) -> Stub:
        return self._pool.stub

    async def _call(
        self,
        method: aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout: float | None = None,
        default_timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Response:
        """Send one unary call and return its response.

        A call that a draining replica rejects is repeated until the deadline. A call whose token is
        rejected is repeated once, if the token source returns another token.

        Args:
            method: The stub's method.
            request: The request.
            timeout: Seconds for the call and all of its repetitions. None for the default.
            default_timeout: The method's default, in seconds. None for the client's.
            metadata: Further metadata of the call.

        Raises:
            ChatHistoryError: The call failed; the subclass depends on the status code.
        """
        timeout_s = next(
            seconds
            for seconds in (timeout, default_timeout, self._timeout_s)
            if seconds is not None
        )
        deadline = time.monotonic() + timeout_s
        token = await self._get_token(timeout_s)
        token_refreshed = False
        drain_error: errors.ChatHistoryError | None = None
        while True:
            try:
                return await method(
                    request,
                    timeout=max(0.0, deadline - time.monotonic()),
                    metadata=_metadata(token, metadata),
                    wait_for_ready=self._wait_for_ready,
                )
            except aio.AioRpcError as rpc_error:
                error = errors.from_rpc_error(rpc_error)
                remaining_s = deadline - time.monotonic()
                if _rejected_while_draining(error) and remaining_s > DRAIN_RETRY_S:
                    drain_error = error if error.reason else drain_error
                    pause_s = random.uniform(DRAIN_RETRY_S / 2, DRAIN_RETRY_S)  # noqa: S311
                    await asyncio.sleep(pause_s)
                    continue
                if drain_error is not None and _is_local_deadline(error):
                    # The service's error has a reason, and that of gRPC has none.
                    raise drain_error from rpc_error
                new_token = (
                    None
                    if token_refreshed
                    else await self._refresh_token(error, token, remaining_s)
                )
                if new_token is None:
                    raise error from rpc_error
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
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Response]:
        """Open one stream and yield its responses. Closing the generator cancels the call.

        Args:
            method: Returns the stub's method.
            request: The request.
            token: The bearer token, empty for none.
            timeout: Seconds for the whole stream. None for no limit.
            metadata: Further metadata of the call.

        Raises:
            ChatHistoryError: The stream failed; the subclass depends on the status code.
        """
        with self._pool.stream_slot() as stub:
            call = method(stub)(
                request,
                timeout=timeout,
                metadata=_metadata(token, metadata),
                wait_for_ready=self._wait_for_ready,
            )
            try:
                async for response in call:
                    yield response
            except aio.AioRpcError as rpc_error:
                raise errors.from_rpc_error(rpc_error) from rpc_error
            except asyncio.CancelledError:
                self._raise_if_closed()
                raise
            finally:
                call.cancel()

    async def _get_token(self, timeout_s: float) -> str:
        """Return the token to send, empty if the client has no token source.

        Raises:
            DeadlineExceeded: The token source did not return in time.
        """
        if self._tokens is None:
            return ""
        timeout_scope = asyncio.timeout(timeout_s)
        try:
            async with timeout_scope:
                return await self._tokens.get()
        except TimeoutError:
            if not timeout_scope.expired():
                raise
            raise errors.DeadlineExceeded(
                f"the token source returned no token within {timeout_s:g} s",
                code=grpc.StatusCode.DEADLINE_EXCEEDED,
            ) from None

    async def _refresh_token(
        self, error: errors.ChatHistoryError, rejected: str, timeout_s: float
    ) -> str | None:
        """Return another token after the service rejected one, None if none arrives in time."""
        if self._tokens is None or not isinstance(error, errors.Unauthenticated):
            return None
        timeout_scope = asyncio.timeout(max(0.0, timeout_s))
        try:
            async with timeout_scope:
                return await self._tokens.get() if await self._tokens.refresh(rejected) else None
        except TimeoutError:
            if not timeout_scope.expired():
                raise
            return None

    def _raise_if_closed(self) -> None:
        """Distinguish a call that `close` cancelled from a task that was cancelled.

        Raises:
            Unavailable: The client was closed during the call.
        """
        task = asyncio.current_task()
        if self._pool.is_closed and (task is None or not task.cancelling()):
            raise errors.Unavailable(
                "the client was closed during the call", code=grpc.StatusCode.UNAVAILABLE
            ) from None


def read_metadata(read_consistency: ReadConsistency) -> Mapping[str, str]:
    """Return the metadata of a read.

    Raises:
        ValueError: The value is unknown.
    """
    if read_consistency not in get_args(ReadConsistency):
        raise ValueError("read_consistency must be 'strong' or 'eventual'")
    return {} if read_consistency == "strong" else {"read_consistency": read_consistency}


def _rejected_while_draining(error: errors.ChatHistoryError) -> bool:
    """Whether a replica that is shutting down did not accept the call.

    A server that stops, or that has more calls than it can accept, cancels calls within gRPC
    itself, without a reason.
    """
    return error.reason == "DRAINING" or (
        error.code is grpc.StatusCode.CANCELLED and not error.reason
    )


def _is_local_deadline(error: errors.ChatHistoryError) -> bool:
    """Whether gRPC itself ended the call at its deadline."""
    return error.code is grpc.StatusCode.DEADLINE_EXCEEDED and not error.reason


def _metadata(token: str, extra: Mapping[str, str] | None = None) -> aio.Metadata:
    pairs: list[tuple[str, Any]] = [*tracing.headers(), *(extra or {}).items()]
    if token:
        # Sent as metadata: gRPC refuses call credentials in plaintext, even to this machine.
        pairs.append(("authorization", f"Bearer {token}"))
    return aio.Metadata(*pairs)
