"""Errors of the client: one class for each status code that the service returns.

    >>> try:
    ...     await client.get_session(user_id=user_id, session_id=new_id())
    ... except NotFound as error:
    ...     print(error.reason, sorted(error.metadata))
    SESSION_NOT_FOUND ['session_id']

Programs should branch on `reason`, which is stable. The text is for people and may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import aio

DOMAIN = "chathistory.v1"
_DETAILS_KEY = "grpc-status-details-bin"


class FieldViolation(NamedTuple):
    """A rejected field: its path, such as `messages[0].content`, and the violated rule."""

    field: str
    description: str


class ChatHistoryError(Exception):
    """Base class of all errors, and the class for status codes without a class of their own.

    Args:
        message: Text for people. It may change.
        code: The gRPC status code.
        reason: Stable reason in UPPER_SNAKE, such as `LAST_SEQ_MISMATCH`. Empty if gRPC or a proxy,
            rather than the service, ended the call.
        metadata: Ids and numbers that the error refers to, such as `last_seq`.
        violations: The rejected fields.
        retry_after: Seconds after which the service asks to retry. None when waiting does not help.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations = violations
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} [{self.reason or self.code.name}]"


class InvalidArgument(ChatHistoryError):
    """The request is invalid. `violations` names the fields."""


class NotFound(ChatHistoryError):
    """The resource does not exist or belongs to another user, without disclosing which."""


class AlreadyExists(ChatHistoryError):
    """Another resource has the id or another unique value."""


class Conflict(ChatHistoryError):
    """The resource was changed concurrently. Read it again and decide."""


class FailedPrecondition(ChatHistoryError):
    """The state of the resource does not allow the call, or search is off."""


class OutOfRange(ChatHistoryError):
    """The database was restored to an earlier state, and lacks messages that a watch has received.

    List the session's messages again, and watch from the last one.
    """


class Unauthenticated(ChatHistoryError):
    """The token is missing, invalid or expired."""


class PermissionDenied(ChatHistoryError):
    """The caller is not allowed to make the call."""


class Overloaded(ChatHistoryError):
    """The service is overloaded (`retry_after` holds the delay), or the request is too large."""


class Unavailable(ChatHistoryError):
    """The service or a dependency did not answer, also after retries. A later call may succeed."""


class DeadlineExceeded(ChatHistoryError):
    """The time ran out. A write may have been stored; repeat it with the same ids."""


class Internal(ChatHistoryError):
    """The service failed. `metadata["request_id"]` identifies the entry in its log."""


_CLASSES: dict[grpc.StatusCode, type[ChatHistoryError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INTERNAL: Internal,
}


def from_rpc_error(error: aio.AioRpcError) -> ChatHistoryError:
    """Convert gRPC's error, with the details of its trailing metadata."""
    code = error.code()
    info, bad_request, retry_info = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in _status(error).details:
        # A no-op unless the detail has this type.
        detail.Unpack(info)
        detail.Unpack(bad_request)
        detail.Unpack(retry_info)
    return _CLASSES.get(code, ChatHistoryError)(
        error.details() or code.name,
        code=code,
        reason=info.reason if info.domain == DOMAIN else "",
        metadata=info.metadata,
        violations=tuple(
            FieldViolation(violation.field, violation.description)
            for violation in bad_request.field_violations
        ),
        retry_after=retry_info.retry_delay.ToTimedelta().total_seconds()
        if retry_info.HasField("retry_delay")
        else None,
    )


def _status(error: aio.AioRpcError) -> Status:
    trailing: Any = error.trailing_metadata()  # Pairs, unlike what the type stubs declare.
    for key, value in trailing or ():
        if key == _DETAILS_KEY:
            try:
                return Status.FromString(value)
            except DecodeError:
                break  # A proxy truncated the details. The code and the message are still valid.
    return Status()
