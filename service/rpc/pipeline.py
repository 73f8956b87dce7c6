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
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
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
from service.rpc.method_policies import POLICIES, Access
from service.rpc.receiving import RequestReceiver
from service.rpc.request_parser import RequestParser, ScannedRequest
from service.rpc.unread_replies import UnreadReplies
from service.rpc.validation import RequestValidator
from service.store.db.db_errors import to_service_error
from service.telemetry.exceptions import locations
from service.telemetry.metrics import CallObserver

PROMPT_FAILURES = 32
"""Calls without a valid identity that are answered immediately in each second."""
FAILURE_DELAY_S = 0.25
"""Time after which further ones are answered: their caller is unknown, so nothing else bounds the
processor time that a flood of them takes."""

_log = structlog.get_logger(__name__)

Context = aio.ServicerContext[Any, Any]


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
        self._validator = RequestValidator()
        self._turns = ConversionTurns()
        self._loop = asyncio.get_running_loop()
        self._failures_second = 0.0
        self._failures = 0
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
                self._receiver.call_started(caller)
                # The task ends once the reply has left this process, or the call has failed: until
                # then the call holds its reply. `context.add_done_callback` does the same, and
                # leaves a cycle of references for the garbage collector.
                _call_task().add_done_callback(lambda _: self._end_call(call))
                n_bytes = len(data)
                if n_bytes > UNCOUNTED_BYTES:
                    data = b""  # No longer needed, and large.
                    request = await self._check_large(name, request, call, n_bytes)
                else:
                    check(request, caller)
                if remaining_s is not None:  # gRPC itself enforces the client's deadline.
                    reply = await method(request, call)
                else:
                    reply = await self._with_timeout(method, request, call)
                reply_data: bytes = reply.SerializeToString()
                if call.held_bytes or len(reply_data) > UNCOUNTED_BYTES:
                    call.hold_reply(len(reply_data), is_write=is_write)
                unread.add(call)
            except BaseException as error:  # noqa: BLE001 - `_abort` always raises
                await self._abort(name, context, error, started)
            if self._observe:
                self._observe(name, grpc.StatusCode.OK, time.perf_counter() - started)
            return reply_data

        return serve

    def _end_call(self, call: Call) -> None:
        self._calls.leave(call.owner_id)
        self._receiver.call_ended(call.caller)
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
                    check(request, caller)
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

    def _request_check(self, name: str) -> Callable[[Any, Caller], None]:
        """Return a function that checks a small request: that it is allowed and valid."""
        validate = self._validator.validate

        def check(request: Any, caller: Caller) -> None:
            if caller.user_id is not None:
                self._authorise(name, request, caller)
            validate(request)

        return check

    async def _check_large(self, name: str, request: Any, call: Call, n_bytes: int) -> Any:
        """Check a large request as `_request_check` does, in turns with others; return it parsed.

        Raises:
            Overloaded: the budget has no room for its bytes.
        """
        call.charge(n_bytes)
        pause = partial(self._turns.pause, call.owner_id, call.deadline)
        if isinstance(request, ScannedRequest):
            request = await request.parse(pause)
        if call.caller.user_id is not None:
            self._authorise(name, request, call.caller)
        await self._validator.validate_in_turns(request, pause)
        return request

    def _authorise(self, name: str, request: Any, caller: Caller) -> None:
        """Reject a request that a user may not send; a service may act for every user."""
        try:
            if POLICIES[name].access is Access.SERVICE_ONLY:
                caller.require_service()
            caller.resolve_user_id(getattr(request, "user_id", ""))
        except errors.PermissionDenied as error:
            if self._audit is not None:
                self._audit.record_denial(name, request, caller, error)
            raise

    async def _abort(
        self, name: str, context: Context, error: BaseException, started: float
    ) -> NoReturn:
        """End a call with an error's status.

        The text of an unexpected exception is never sent, since it may hold content or secrets.
        """
        if isinstance(error, aio.AbortError):
            self._record_end(name, context.code(), started)
            _free_when_done(error)
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
        if isinstance(service_error, errors.Unauthenticated):
            await self._delay_failure()
        self._record_end(name, status.CODES[type(service_error)], started)
        try:
            await status.abort(context, service_error)
        except aio.AbortError as abort_error:
            _free_when_done(abort_error)
            raise
        except ExecuteBatchError:
            raise asyncio.CancelledError from None

    async def _delay_failure(self) -> None:
        """Wait before a failed authentication is answered, if there are many in this second."""
        now = self._loop.time()
        if now - self._failures_second > 1:
            self._failures_second, self._failures = now, 0
        self._failures += 1
        if self._failures > PROMPT_FAILURES:
            await asyncio.sleep(FAILURE_DELAY_S)

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


def _call_task() -> asyncio.Task[Any]:
    """Return the task of the call that is served."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - gRPC runs each handler in a task
    return task


def _free_when_done(error: aio.AbortError) -> None:
    """Free what an error that gRPC keeps refers to, when the call's task ends.

    Its traceback refers to the frames of the handler, these to the context, and the context to the
    error: a cycle, and thousands of them make a garbage collection hold the event loop.
    """

    def drop_traceback(_: asyncio.Task[Any]) -> None:
        error.__traceback__ = None

    _call_task().add_done_callback(drop_traceback)


def _owner_id(caller: Caller, request: Any) -> str:
    """Return the user whose fair share a call uses: the caller, or the user a service acts for."""
    return caller.user_id or getattr(request, "user_id", "") or ""


def _parse_small(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """Parse the request of a stream, which is kept while the stream is open."""
    if len(data) > UNCOUNTED_BYTES:
        raise errors.TooLarge(f"the request of a stream may have at most {UNCOUNTED_BYTES} bytes")
    return parse(data)


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
