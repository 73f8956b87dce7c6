"""What every call passes, in this order: telemetry, errors, caller, admission, validation (after the caller's rights); then its method.

It is composed once per method when the server is built, not as interceptors: each of those costs every call an await and a context.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NoReturn

import grpc
import protovalidate
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from service import errors
from service.auth.caller import Authenticate, Caller, authorise
from service.rpc import status
from service.store.db.db_errors import to_service_error
from service.telemetry import Observer

_log = structlog.get_logger(__name__)

Context = aio.ServicerContext[Any, Any]

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Of a request, unpacked; beyond it REQUEST_TOO_LARGE."""

REFUSALS = 200
"""Refusals a second beyond which those who are refused are told to wait longer."""
MIN_PAUSE, MAX_PAUSE = 0.25, 8.0
"""Seconds that they are told to wait, half as much more or less."""


@dataclass(slots=True)
class Call:
    """What a method knows of its call, beside the request."""

    caller: Caller
    deadline: float
    """When the answer is due, on the running loop's clock."""


class Admission:
    """How much work is let in at once, whose. Health checks do not pass here, so they answer also under overload.

    One user alone may fill the limit. A quarter more is there for those who have little under way then, so that nobody who floods keeps
    others out; the fuller that is, the less somebody may have to be let in.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.most = limit + max(1, limit // 4)
        self.in_flight = 0
        self.last_left = -math.inf
        """When a call ended last, on the monotonic clock."""
        self.draining = False
        self._counts: dict[str, int] = {}
        self._refusals = _Refusals()

    def enter(self, owner_id: str) -> None:
        """Let a user's call in; `leave` must follow.

        Raises:
            Unavailable: the server is going away (DRAINING).
            Overloaded: too many calls are under way.
        """
        if self.draining:
            raise draining()
        count = self._counts.get(owner_id, 0)
        if self.in_flight >= self.limit and count >= self.most - self.in_flight:
            raise errors.Overloaded(
                "too many calls are under way; try again", retry_after=self._refusals.pause()
            )
        self._counts[owner_id] = count + 1
        self.in_flight += 1

    def leave(self, owner_id: str) -> None:
        """Note that a user's call has ended."""
        self.in_flight -= 1
        self.last_left = time.monotonic()
        count = self._counts[owner_id]
        if count > 1:
            self._counts[owner_id] = count - 1
        else:
            del self._counts[owner_id]


class Streams(Admission):
    """The same for streams, which last. On one connection they may not take the place of all other calls, which would wait without a word."""

    def __init__(self, limit: int, per_connection: int) -> None:
        super().__init__(limit)
        self._per_connection = per_connection
        self._connections: Counter[str] = Counter()

    @contextmanager
    def entered(self, owner_id: str, peer: str) -> Generator[None]:
        """Let a user's stream in for a block; `peer` is gRPC's name of the connection.

        Raises:
            Unavailable, Overloaded: as `enter`.
            Overloaded: too many streams are open on this connection.
        """
        # All connections over a Unix socket have one name.
        connection = "" if peer.startswith("unix:") else peer
        if connection and self._connections[connection] >= self._per_connection:
            raise errors.Overloaded(
                f"{self._per_connection} streams are open on this connection; open another one",
                retry_after=MAX_PAUSE,
            )
        self.enter(owner_id)
        self._connections[connection] += 1
        try:
            yield
        finally:
            self.leave(owner_id)
            self._connections[connection] -= 1
            if not self._connections[connection]:
                del self._connections[connection]


class _Refusals:
    """When those who are refused should come again: the more of them there are, the later, as each costs nearly what a call does."""

    def __init__(self) -> None:
        self._pause = MIN_PAUSE
        self._second = 0.0
        self._count = 0

    def pause(self) -> float:
        """Count a refusal and return for how many seconds to wait; never the same, so that they do not come together again."""
        now = time.monotonic()
        past = now - self._second
        if past >= 1:
            if self._count > REFUSALS and past < MAX_PAUSE:
                self._pause = min(self._pause * 2, MAX_PAUSE)
            elif self._count < REFUSALS / 2 or past >= MAX_PAUSE:
                self._pause = max(self._pause / 2, MIN_PAUSE)
            self._second, self._count = now, 0
        self._count += 1
        return self._pause * random.uniform(0.5, 1.5)  # noqa: S311 - spreads load, keeps no secret


def draining() -> errors.Unavailable:
    """Make the error that sends a caller to another replica."""
    return errors.Unavailable(
        "this server is shutting down; try again", reason="DRAINING", retry_after=0.1
    )


class _Unread(Enum):
    """Stands for a request whose bytes were not read, until it is known who sends it."""

    MALFORMED = auto()
    TOO_LARGE = auto()


class Pipeline:
    """Wraps the methods of a service."""

    def __init__(
        self,
        authenticate: Authenticate,
        calls: Admission,
        streams: Streams,
        call_timeout: float,
        observe: Observer | None = None,
        authorise: Callable[[str, Caller, Any], None] = authorise,
    ) -> None:
        self._authenticate = authenticate
        self._authorise = authorise
        self._calls = calls
        self._streams = streams
        self._call_timeout = call_timeout
        self._observe = observe
        self._validate = protovalidate.Validator().validate
        self._loop = asyncio.get_running_loop()

    def handlers(
        self, service: ServiceDescriptor, servicer: object
    ) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the wrapped methods of a servicer, by name.

        Raises:
            AttributeError: the servicer lacks a method of the service.
        """
        made: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for method in service.methods:
            wrap, handler = (
                (self._stream, grpc.unary_stream_rpc_method_handler)
                if method.server_streaming
                else (self._unary, grpc.unary_unary_rpc_method_handler)
            )
            made[method.name] = handler(
                wrap(method.name, getattr(servicer, method.name)),
                request_deserializer=_parser(GetMessageClass(method.input_type)),
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
        return made

    def _unary(
        self, name: str, method: Callable[[Any, Call], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        loop = self._loop

        async def serve(request: Any, context: Context) -> Any:
            started = time.perf_counter() if self._observe else 0.0
            try:
                caller = await self._authenticate(context)
                owner_id = _owner_id(caller, request)
                self._calls.enter(owner_id)
                try:
                    self._check(name, request, caller)
                    left: float | None = context.time_remaining()
                    if left is not None:  # gRPC itself ends the call then.
                        reply = await method(request, Call(caller, loop.time() + left))
                    else:
                        reply = await self._timed(method, request, caller)
                finally:
                    self._calls.leave(owner_id)
            except BaseException as error:  # noqa: BLE001 - told apart there, and always raised again
                await self._fail(name, context, error, started)
            if self._observe:
                self._observe(name, grpc.StatusCode.OK, time.perf_counter() - started)
            return reply

        return serve

    async def _timed(
        self, method: Callable[[Any, Call], Awaitable[Any]], request: Any, caller: Caller
    ) -> Any:
        """Serve a call whose client set no deadline."""
        deadline = self._loop.time() + self._call_timeout
        scope = asyncio.timeout_at(deadline)
        try:
            async with scope:
                return await method(request, Call(caller, deadline))
        except TimeoutError:
            if scope.expired():
                raise errors.DeadlineExceeded(
                    f"the call took more than {self._call_timeout:g} s"
                ) from None
            raise

    def _stream(
        self, name: str, method: Callable[[Any, Call], AsyncGenerator[Any]]
    ) -> Callable[[Any, Context], Awaitable[None]]:
        async def serve(request: Any, context: Context) -> None:
            started = time.perf_counter() if self._observe else 0.0
            try:
                caller = await self._authenticate(context)
                owner_id = _owner_id(caller, request)
                with self._streams.entered(owner_id, context.peer()):
                    self._check(name, request, caller)
                    deadline = self._loop.time() + (context.time_remaining() or self._call_timeout)
                    async with aclosing(method(request, Call(caller, deadline))) as replies:
                        async for reply in replies:
                            await context.write(reply)
            except BaseException as error:  # noqa: BLE001 - told apart there, and always raised again
                await self._fail(name, context, error, started)
            if self._observe:
                self._observe(name, grpc.StatusCode.OK, time.perf_counter() - started)

        return serve

    def _check(self, name: str, request: Any, caller: Caller) -> None:
        if request is _Unread.MALFORMED:
            raise errors.InvalidArgument(
                "the request's bytes are no valid message", reason="MALFORMED_REQUEST"
            )
        if request is _Unread.TOO_LARGE:
            raise errors.TooLarge(f"a request must be at most {MAX_REQUEST_BYTES} bytes")
        if caller.user_id is not None:  # A service may do everything.
            self._authorise(name, caller, request)
        try:
            self._validate(request)
        except protovalidate.ValidationError as error:
            raise errors.InvalidArgument.fields(tuple(map(_violation, error.violations))) from None

    async def _fail(
        self, name: str, context: Context, error: BaseException, started: float
    ) -> NoReturn:
        """Answer with an error's status; nothing of an exception's own words goes out."""
        if isinstance(error, aio.AbortError):
            raise error
        if not isinstance(error, Exception | asyncio.CancelledError):
            raise error
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is None or task.cancelling() or context.cancelled():
                self._tell(name, grpc.StatusCode.CANCELLED, started)
                raise error
            # Cancelled from within: gRPC would send no status at all, and the client would wait for its deadline (grpc #29248).
        known = error if isinstance(error, errors.ServiceError) else to_service_error(error)
        if known is None:
            request_id = str(uuid.uuid4())
            _log.error(
                "internal error",
                method=name,
                request_id=request_id,
                error=type(error).__name__,
                where=_where(error),
            )
            known = errors.ServiceError("internal error", request_id=request_id)
        code, details = status.of(known)
        self._tell(name, code, started)
        await context.abort(
            code, known.message, (("grpc-status-details-bin", details.SerializeToString()),)
        )

    def _tell(self, name: str, code: grpc.StatusCode, started: float) -> None:
        if self._observe:
            self._observe(name, code, time.perf_counter() - started)


def _owner_id(caller: Caller, request: Any) -> str:
    """Return the user on whose account a call counts: the caller, or the one for whom a service calls."""
    return caller.user_id or getattr(request, "user_id", "") or ""


def _parser(kind: type[Message]) -> Callable[[bytes], Any]:
    """Wrap a deserializer: what it raises would reach the client as UNKNOWN, before any of our code runs."""
    parse = kind.FromString

    def deserialize(data: bytes) -> Any:
        if len(data) > MAX_REQUEST_BYTES:
            return _Unread.TOO_LARGE
        try:
            return parse(data)
        except (DecodeError, ValueError, RecursionError):
            return _Unread.MALFORMED

    return deserialize


def _violation(violation: protovalidate.Violation) -> errors.FieldViolation:
    found = violation.proto
    path = ""
    for element in found.field.elements if found.field else ():
        path += f".{element.field_name}" if path else element.field_name
        if element.subscript is not None:
            path += f"[{element.subscript.value}]"
    if found.rule_id == "string.not_contains":
        return errors.FieldViolation(path, "must not contain NUL")
    return errors.FieldViolation(path, found.message or found.rule_id)


def _where(error: BaseException) -> list[str]:
    """Return the places that an exception came through, without its words: they may hold what nobody should read."""
    places: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return places
