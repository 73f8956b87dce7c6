"""The steps around every RPC.

In this order: metrics, error mapping, authentication, admission, authorisation, validation, audit.
They are composed once for each method, when the server is built. They are not interceptors,
since every interceptor adds an await and a context to each call.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from types import FrameType
from typing import Any, NoReturn

import grpc
import protovalidate
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio
from grpc._cython.cygrpc import (  # type: ignore[import-not-found]
    ExecuteBatchError,
    _ServerStoppedError,
)

from service import errors
from service.auth.authenticators import Authenticate
from service.auth.caller import Caller
from service.rpc import status
from service.rpc.admission import Admission, StreamAdmission
from service.rpc.audit import AuditTrail
from service.rpc.byte_budget import ByteBudget
from service.rpc.call import UNCOUNTED_BYTES, Call, StreamMethod, UnaryMethod
from service.rpc.conversion_turns import ConversionTurns
from service.rpc.convert_structs import STRUCT
from service.rpc.method_policies import POLICIES, Access
from service.rpc.receiving import RequestReceiver
from service.rpc.request_parser import RequestParser, ScannedRequest
from service.rpc.unread_replies import UnreadReplies
from service.store.db.db_errors import to_service_error
from service.telemetry.exceptions import locations
from service.telemetry.metrics import CallObserver

_log = structlog.get_logger(__name__)

Context = aio.ServicerContext[Any, Any]

SMALL_REQUEST_BYTES = 2 * 1024
"""Larger requests that are invalid may have too many violations to collect."""
MAX_COUNTED_ELEMENTS = 1_000
"""Elements of a larger request up to which all its violations are collected."""


class Pipeline:
    """Wraps the methods of a servicer."""

    def __init__(
        self,
        authenticate: Authenticate,
        calls: Admission,
        streams: StreamAdmission,
        budget: ByteBudget,
        call_timeout_s: float,
        receiver: RequestReceiver | None = None,
        unread: UnreadReplies | None = None,
        observe: CallObserver | None = None,
        audit: AuditTrail | None = None,
    ) -> None:
        """Take the steps.

        Args:
            authenticate: Returns the caller of a call.
            calls: Admits unary calls.
            streams: Admits streams.
            budget: Bounds the bytes that calls and streams hold.
            call_timeout_s: Limit of a call whose client set no deadline.
            receiver: Receives the requests; None for one with the default limits.
            unread: Watches the replies that clients do not read; None for no limit.
            observe: Records each finished call in the metrics.
            audit: Records calls in the audit trail.
        """
        self._authenticate = authenticate
        self._calls = calls
        self._streams = streams
        self._budget = budget
        self._call_timeout_s = call_timeout_s
        self._receiver = receiver or RequestReceiver()
        self._unread = unread or UnreadReplies(budget, lambda _connections: None)
        self._observe = observe
        self._audit = audit
        self._validator = protovalidate.Validator()
        self._turns = ConversionTurns()
        self._loop = asyncio.get_running_loop()
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_not_a_disconnect)

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
                (self._stream, grpc.stream_stream_rpc_method_handler)
                if method.server_streaming
                else (self._unary, grpc.stream_unary_rpc_method_handler)
            )
            # To gRPC all requests are streams: it would otherwise receive a whole request before
            # any of our code runs. On the wire there is no difference. The handlers take and return
            # bytes: a deserializer that raised would let gRPC answer with UNKNOWN, and the sizes
            # are needed for the budget.
            handlers[method.name] = make_handler(
                wrap(
                    method.name,
                    RequestParser(GetMessageClass(method.input_type)),
                    getattr(servicer, method.name),
                )
            )
        return handlers

    def _unary(
        self, name: str, parser: RequestParser, method: UnaryMethod
    ) -> Callable[[Any, Context], Awaitable[bytes]]:
        loop = self._loop
        parse = parser.parse
        receive, unread, budget = self._receiver.receive, self._unread, self._budget
        is_write = POLICIES[name].is_write
        check = self._request_check(name)
        if self._audit is not None:
            method = self._audit.wrap_unary(name, POLICIES[name].audit, method)

        async def serve(_requests: Any, context: Context) -> bytes:
            started = time.perf_counter() if self._observe else 0.0
            try:
                caller = await self._authenticate(context)
                data = await receive(context, caller)
                request = parse(data)
                owner_id = _owner_id(caller, request)
                remaining_s: float | None = context.time_remaining()
                timeout_s = self._call_timeout_s if remaining_s is None else remaining_s
                call = Call(caller, loop.time() + timeout_s, owner_id, budget, context)
                if budget.held > budget.unchecked_bytes:
                    budget.check_room(owner_id, call.connection)
                self._calls.enter(owner_id)
                # gRPC runs the callback once the reply has left this process, or the call has
                # failed: until then the call holds its reply.
                context.add_done_callback(
                    lambda _context: self._end_call(call)  # type: ignore[arg-type] # the stub is wrong
                )
                n_bytes = len(data)
                if n_bytes > UNCOUNTED_BYTES:
                    call.charge(n_bytes)
                    data = b""  # No longer needed, and large.
                    if isinstance(request, ScannedRequest):
                        request = await request.parse(
                            lambda: self._turns.pause(owner_id, call.deadline)
                        )
                check(request, caller, n_bytes)
                if remaining_s is not None:  # gRPC itself enforces the client's deadline.
                    reply = await method(request, call)
                else:
                    reply = await self._with_timeout(method, request, call)
                reply_data: bytes = reply.SerializeToString()
                if call.held_bytes or len(reply_data) > UNCOUNTED_BYTES:
                    call.hold_reply(len(reply_data), is_write=is_write)
                unread.add(call)
            except BaseException as error:  # noqa: BLE001 - `_abort` always raises
                data, request, reply, reply_data = b"", None, None, b""  # See `_abort`.
                await self._abort(name, context, error, started)
            if self._observe:
                self._observe(name, grpc.StatusCode.OK, time.perf_counter() - started)
            return reply_data

        return serve

    def _end_call(self, call: Call) -> None:
        self._calls.leave(call.owner_id)
        self._unread.remove(call)
        if call.held_bytes:
            call.release(call.held_bytes)

    async def _with_timeout(self, method: UnaryMethod, request: Any, call: Call) -> Any:
        """Run a call whose client set no deadline."""
        scope = asyncio.timeout_at(call.deadline)
        try:
            async with scope:
                return await method(request, call)
        except TimeoutError:
            if scope.expired():
                raise errors.DeadlineExceeded(
                    f"the call took longer than {self._call_timeout_s:g} s, the server's limit for "
                    "calls without a deadline"
                ) from None
            raise

    def _stream(
        self, name: str, parser: RequestParser, method: StreamMethod
    ) -> Callable[[Any, Context], Awaitable[None]]:
        parse = parser.parse
        check = self._request_check(name)
        if self._audit is not None:
            method = self._audit.wrap_stream(name, POLICIES[name].audit, method)

        async def serve(_requests: Any, context: Context) -> None:
            started = time.perf_counter() if self._observe else 0.0
            try:
                caller = await self._authenticate(context)
                data = await self._receiver.receive(context, caller)
                request = _parse_small(parse, data)
                deadline = self._loop.time() + (context.time_remaining() or self._call_timeout_s)
                call = Call(caller, deadline, _owner_id(caller, request), self._budget, context)
                with self._streams.admitted(call.owner_id, call.connection):
                    check(request, caller, len(data))
                    try:
                        async with aclosing(method(request, call)) as replies:
                            async for reply in replies:
                                await self._write(reply.SerializeToString(), call, context)
                    finally:
                        self._unread.remove_of_stream(call)
                        if call.held_bytes:
                            call.release(call.held_bytes)
            except BaseException as error:  # noqa: BLE001 - `_abort` always raises
                await self._abort(name, context, error, started)
            if self._observe:
                self._observe(name, grpc.StatusCode.OK, time.perf_counter() - started)

        return serve

    async def _write(self, data: bytes, call: Call, context: Context) -> None:
        """Send a reply of a stream, and hold its bytes until the client has made room for it."""
        n_bytes = len(data)
        if n_bytes <= UNCOUNTED_BYTES and not call.held_bytes:
            await context.write(data)
            return
        # A method that holds bytes has reserved them for its replies. Waiting for more here could
        # let streams wait for each other.
        n_bytes = 0 if call.held_bytes else n_bytes
        if n_bytes:
            await call.reserve(n_bytes)
        self._unread.add_of_stream(call)
        await context.write(data)
        self._unread.remove_of_stream(call)
        if n_bytes:
            call.release(n_bytes)

    def _request_check(self, name: str) -> Callable[[Any, Caller, int], None]:
        """Return a function that checks a request: that it is allowed and valid.

        It takes the request, the caller and the size of the request in bytes.
        """
        validate = self._validator.validate
        authorise = self._authorisation(name)

        def check(request: Any, caller: Caller, size_bytes: int) -> None:
            if caller.user_id is not None:  # A service may act for every user.
                authorise(request, caller)
            try:
                if size_bytes <= SMALL_REQUEST_BYTES:
                    validate(request)
                else:
                    self._validate_large(request)
            except protovalidate.ValidationError as error:
                violations = tuple(map(_field_violation, error.violations))
                raise errors.InvalidArgument.fields(violations) from None

        return check

    def _validate_large(self, request: Any) -> None:
        """Validate a request, and stop at the first violation if it has many elements.

        Each violation takes longer than the validation of many elements.

        Raises:
            protovalidate.ValidationError: the request is invalid.
        """
        try:
            self._validator.validate(request, fail_fast=True)
        except protovalidate.ValidationError:
            if _count_elements(request) > MAX_COUNTED_ELEMENTS:
                raise
            self._validator.validate(request)

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

        The error that gRPC raises here and keeps refers to this frame, its caller and the error,
        and they to it. Only a garbage collection frees such objects, so no large one may be among
        them.
        """
        if isinstance(error, aio.AbortError):
            self._record_end(name, context.code(), started)
            raise error
        if isinstance(error, ExecuteBatchError | _ServerStoppedError):
            # The client has cancelled the call, or its connection is closed: a write failed before
            # gRPC has cancelled this task. gRPC logs nothing about a cancelled call.
            self._record_end(name, grpc.StatusCode.CANCELLED, started)
            raise asyncio.CancelledError from None
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
        error.__traceback__ = error.__context__ = error.__cause__ = None
        self._record_end(name, status.CODES[type(service_error)], started)
        try:
            await status.abort(context, service_error)
        except ExecuteBatchError:
            raise asyncio.CancelledError from None

    def _record_end(self, name: str, code: grpc.StatusCode, started: float) -> None:
        if self._observe:
            self._observe(name, code, time.perf_counter() - started)


def find_method(frame: FrameType) -> str | None:
    """Return the RPC that a stack frame serves; None for a frame that is not of the pipeline."""
    code = frame.f_code
    if code.co_name != "serve" or code.co_filename != __file__:
        return None
    name = frame.f_locals.get("name")
    return name if isinstance(name, str) else None


def _owner_id(caller: Caller, request: Any) -> str:
    """Return the user whose fair share a call uses: the caller, or the user a service acts for."""
    return caller.user_id or getattr(request, "user_id", "") or ""


def _count_elements(message: Message) -> int:
    """Count the elements of the lists in a message, and stop beyond MAX_COUNTED_ELEMENTS."""
    count = 0
    for field, value in message.ListFields():
        is_struct = field.message_type is not None and field.message_type.full_name == STRUCT
        if is_struct or (field.message_type is None and not field.is_repeated):
            continue
        items = value if field.is_repeated else (value,)
        count += len(items)
        if field.message_type is not None:
            for item in items:
                if count > MAX_COUNTED_ELEMENTS:
                    break
                count += _count_elements(item)
    return count


def _parse_small(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """Parse the request of a stream, which is kept while the stream is open."""
    if len(data) > UNCOUNTED_BYTES:
        raise errors.TooLarge(f"the request of a stream may have at most {UNCOUNTED_BYTES} bytes")
    return parse(data)


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
        where=locations(error),
    )
    return errors.ServiceError("internal error", request_id=request_id)


def _is_not_a_disconnect(record: logging.LogRecord) -> bool:
    """Return False for gRPC's traceback of a reply whose client disconnected, at level error."""
    return not (record.exc_info and record.exc_info[0] is ExecuteBatchError)
