"""What every call passes, in this order: telemetry, errors, caller, admission, validation (after the caller's rights); then its method.

It is composed once per method when the server is built, not as interceptors: each of those costs every call an await and a context.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
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
from service.rpc.admission import Admission, StreamAdmission
from service.store.db.db_errors import to_service_error
from service.telemetry import Observer

_log = structlog.get_logger(__name__)

Context = aio.ServicerContext[Any, Any]

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Of a request, unpacked; beyond it REQUEST_TOO_LARGE."""


@dataclass(slots=True)
class Call:
    """What a method knows of its call, beside the request."""

    caller: Caller
    deadline: float
    """When the answer is due, on the running loop's clock."""


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
        streams: StreamAdmission,
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
                with self._streams.admitted(owner_id, context.peer()):
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
