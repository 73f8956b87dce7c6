"""The steps around every RPC.

In this order: metrics, error mapping, authentication, admission, authorisation, validation, audit.
They are composed once for each method, when the server is built. They are not interceptors,
since every interceptor adds an await and a context to each call.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
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
from service.auth.authenticators import Authenticate
from service.auth.caller import Caller
from service.rpc import status
from service.rpc.admission import Admission, StreamAdmission
from service.rpc.audit import AuditTrail
from service.rpc.call import Call, StreamMethod, UnaryMethod
from service.rpc.method_policies import POLICIES, Access
from service.store.db.db_errors import to_service_error
from service.telemetry.metrics import CallObserver

_log = structlog.get_logger(__name__)

Context = aio.ServicerContext[Any, Any]

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Limit of a request after decompression. Larger ones are rejected with REQUEST_TOO_LARGE."""


class _Unparsed(Enum):
    """Replaces a request that was not parsed, until its caller is authenticated."""

    MALFORMED = auto()
    TOO_LARGE = auto()


class Pipeline:
    """Wraps the methods of a servicer."""

    def __init__(
        self,
        authenticate: Authenticate,
        calls: Admission,
        streams: StreamAdmission,
        call_timeout_s: float,
        observe: CallObserver | None = None,
        audit: AuditTrail | None = None,
    ) -> None:
        """Take the steps.

        Args:
            authenticate: Returns the caller of a call.
            calls: Admits unary calls.
            streams: Admits streams.
            call_timeout_s: Limit of a call whose client set no deadline.
            observe: Records each finished call in the metrics.
            audit: Records calls in the audit trail.
        """
        self._authenticate = authenticate
        self._calls = calls
        self._streams = streams
        self._call_timeout_s = call_timeout_s
        self._observe = observe
        self._audit = audit
        self._validate = protovalidate.Validator().validate
        self._loop = asyncio.get_running_loop()

    def handlers(
        self, service: ServiceDescriptor, servicer: object
    ) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the wrapped methods of a servicer, by name.

        Raises:
            AttributeError: the servicer lacks a method of the service.
            KeyError: a method has no entry in `method_policies.POLICIES`.
        """
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for method in service.methods:
            wrap, make_handler = (
                (self._stream, grpc.unary_stream_rpc_method_handler)
                if method.server_streaming
                else (self._unary, grpc.unary_unary_rpc_method_handler)
            )
            handlers[method.name] = make_handler(
                wrap(method.name, getattr(servicer, method.name)),
                request_deserializer=_deserializer(GetMessageClass(method.input_type)),
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
        return handlers

    def _unary(self, name: str, method: UnaryMethod) -> Callable[[Any, Context], Awaitable[Any]]:
        loop = self._loop
        check = self._request_check(name)
        if self._audit is not None:
            method = self._audit.wrap_unary(name, POLICIES[name].audit, method)

        async def serve(request: Any, context: Context) -> Any:
            started = time.perf_counter() if self._observe else 0.0
            try:
                caller = await self._authenticate(context)
                owner_id = _owner_id(caller, request)
                self._calls.enter(owner_id)
                try:
                    check(request, caller)
                    remaining_s: float | None = context.time_remaining()
                    if remaining_s is not None:  # gRPC itself enforces the client's deadline.
                        reply = await method(request, Call(caller, loop.time() + remaining_s))
                    else:
                        reply = await self._with_timeout(method, request, caller)
                finally:
                    self._calls.leave(owner_id)
            except BaseException as error:  # noqa: BLE001 - `_abort` always raises
                await self._abort(name, context, error, started)
            if self._observe:
                self._observe(name, grpc.StatusCode.OK, time.perf_counter() - started)
            return reply

        return serve

    async def _with_timeout(self, method: UnaryMethod, request: Any, caller: Caller) -> Any:
        """Run a call whose client set no deadline."""
        deadline = self._loop.time() + self._call_timeout_s
        scope = asyncio.timeout_at(deadline)
        try:
            async with scope:
                return await method(request, Call(caller, deadline))
        except TimeoutError:
            if scope.expired():
                raise errors.DeadlineExceeded(
                    f"the call took longer than {self._call_timeout_s:g} s, the server's limit for "
                    "calls without a deadline"
                ) from None
            raise

    def _stream(self, name: str, method: StreamMethod) -> Callable[[Any, Context], Awaitable[None]]:
        check = self._request_check(name)
        if self._audit is not None:
            method = self._audit.wrap_stream(name, POLICIES[name].audit, method)

        async def serve(request: Any, context: Context) -> None:
            started = time.perf_counter() if self._observe else 0.0
            try:
                caller = await self._authenticate(context)
                owner_id = _owner_id(caller, request)
                with self._streams.admitted(owner_id, context.peer()):
                    check(request, caller)
                    deadline = self._loop.time() + (
                        context.time_remaining() or self._call_timeout_s
                    )
                    async with aclosing(method(request, Call(caller, deadline))) as replies:
                        async for reply in replies:
                            await context.write(reply)
            except BaseException as error:  # noqa: BLE001 - `_abort` always raises
                await self._abort(name, context, error, started)
            if self._observe:
                self._observe(name, grpc.StatusCode.OK, time.perf_counter() - started)

        return serve

    def _request_check(self, name: str) -> Callable[[Any, Caller], None]:
        """Return a function that checks a request: that it was parsed, is allowed, and is valid."""
        validate = self._validate
        authorise = self._authorisation(name)

        def check(request: Any, caller: Caller) -> None:
            if isinstance(request, _Unparsed):
                raise _unparsed_error(request)
            if caller.user_id is not None:  # A service may act for every user.
                authorise(request, caller)
            try:
                validate(request)
            except protovalidate.ValidationError as error:
                violations = tuple(map(_field_violation, error.violations))
                raise errors.InvalidArgument.fields(violations) from None

        return check

    def _authorisation(self, name: str) -> Callable[[Any, Caller], None]:
        """Return a function that rejects the requests that a user may not send."""
        is_service_only = POLICIES[name].access is Access.SERVICE_ONLY

        def authorise(request: Any, caller: Caller) -> None:
            try:
                if is_service_only:
                    caller.require_service()
                caller.resolve_user_id(getattr(request, "user_id", ""))
            except errors.PermissionDenied as error:
                if self._audit is not None:
                    self._audit.record_denial(name, request, caller, error)
                raise

        return authorise

    async def _abort(
        self, name: str, context: Context, error: BaseException, started: float
    ) -> NoReturn:
        """End a call with an error's status.

        The text of an unexpected exception is never sent, since it may hold content or secrets.
        """
        if isinstance(error, aio.AbortError):
            raise error
        if not isinstance(error, Exception | asyncio.CancelledError):
            raise error
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is None or task.cancelling() or context.cancelled():
                self._record_end(name, grpc.StatusCode.CANCELLED, started)
                raise error
            # The RPC's own code was cancelled, not the call. If this were raised, gRPC would send
            # no status at all, and the client would wait until its deadline (grpc #29248).
        service_error = error if isinstance(error, errors.ServiceError) else to_service_error(error)
        if service_error is None:
            service_error = _internal_error(name, error)
        code, details = status.of(service_error)
        self._record_end(name, code, started)
        await context.abort(
            code, service_error.message, (("grpc-status-details-bin", details.SerializeToString()),)
        )

    def _record_end(self, name: str, code: grpc.StatusCode, started: float) -> None:
        if self._observe:
            self._observe(name, code, time.perf_counter() - started)


def _owner_id(caller: Caller, request: Any) -> str:
    """Return the user whose fair share a call uses: the caller, or the user a service acts for."""
    return caller.user_id or getattr(request, "user_id", "") or ""


def _deserializer(message_class: type[Message]) -> Callable[[bytes], Any]:
    """Return a deserializer that does not raise.

    If it raised, gRPC would answer with UNKNOWN before any of our code runs.
    """
    parse = message_class.FromString

    def deserialize(data: bytes) -> Any:
        if len(data) > MAX_REQUEST_BYTES:
            return _Unparsed.TOO_LARGE
        try:
            return parse(data)
        except (DecodeError, ValueError, RecursionError):
            return _Unparsed.MALFORMED

    return deserialize


def _unparsed_error(request: _Unparsed) -> errors.ServiceError:
    if request is _Unparsed.TOO_LARGE:
        return errors.TooLarge(f"the request is larger than {MAX_REQUEST_BYTES} bytes; split it")
    return errors.InvalidArgument(
        "the request cannot be parsed: it is not a valid protobuf message of this method's type",
        reason="MALFORMED_REQUEST",
    )


def _field_violation(violation: protovalidate.Violation) -> errors.FieldViolation:
    proto = violation.proto
    path = ""
    for element in proto.field.elements if proto.field else ():
        path += f".{element.field_name}" if path else element.field_name
        if element.subscript is not None:
            path += f"[{element.subscript.value}]"
    if proto.rule_id == "string.not_contains":
        return errors.FieldViolation(path, "must not contain NUL")
    return errors.FieldViolation(path, proto.message or proto.rule_id)


def _internal_error(name: str, error: BaseException) -> errors.ServiceError:
    """Log an unexpected exception and return the error for the client; a request id links them."""
    request_id = str(uuid.uuid4())
    _log.error(
        "internal error",
        method=name,
        request_id=request_id,
        error=type(error).__name__,
        where=_traceback(error),
    )
    return errors.ServiceError("internal error", request_id=request_id)


def _traceback(error: BaseException) -> list[str]:
    """Return an exception's frames without its text, which may hold content or secrets."""
    frames: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        file_name = code.co_filename.rsplit("/", 1)[-1]
        frames.append(f"{file_name}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return frames
