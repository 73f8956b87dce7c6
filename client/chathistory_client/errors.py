"""What can go wrong: one class for each status code that the service answers with.

    >>> try:
    ...     await client.get_session(user_id=user_id, session_id=new_id())
    ... except NotFound as error:
    ...     print(error.reason, sorted(error.metadata))
    SESSION_NOT_FOUND ['session_id']

`reason` is stable and what a program should branch on; the text is for people and may change.
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
    """One refused field: its path in the request, such as `messages[0].content`, and what is wrong with it."""

    field: str
    description: str


class ChatHistoryError(Exception):
    """Base of all of them, and the class of a status code that has none of its own."""

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
        """Stable, in UPPER_SNAKE, such as `LAST_SEQ_MISMATCH`; empty when the answer did not come from the service itself."""
        self.metadata = dict(metadata or {})
        """Ids and numbers that the error is about, such as `last_seq`."""
        self.violations = violations
        """Which fields were refused."""
        self.retry_after = retry_after
        """Seconds after which the service asks to be tried again; None when waiting does not help."""

    def __str__(self) -> str:
        return f"{self.message} [{self.reason or self.code.name}]"


class InvalidArgument(ChatHistoryError):
    """The request itself is wrong; `violations` names the fields."""


class NotFound(ChatHistoryError):
    """The thing is missing, or somebody else's: nobody can tell which."""


class AlreadyExists(ChatHistoryError):
    """The id, or another unique value, is taken by something else."""


class Conflict(ChatHistoryError):
    """Somebody else has changed the thing meanwhile: read it again and decide."""


class FailedPrecondition(ChatHistoryError):
    """The thing is not in a state that allows this, or search is switched off."""


class Unauthenticated(ChatHistoryError):
    """The token is missing, malformed or expired."""


class PermissionDenied(ChatHistoryError):
    """The caller may not do this."""


class Overloaded(ChatHistoryError):
    """Too much is asked at once (`retry_after` says when to come back), or the request is too large."""


class Unavailable(ChatHistoryError):
    """The service, or what it needs, does not answer now. It was tried again already; trying later may help."""


class DeadlineExceeded(ChatHistoryError):
    """The call's time is up. Whether a write was stored is open: the same ids again will tell."""


class Internal(ChatHistoryError):
    """The service has failed; `metadata["request_id"]` finds it in the service's log."""


_CLASSES: dict[grpc.StatusCode, type[ChatHistoryError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INTERNAL: Internal,
}


def from_rpc_error(error: aio.AioRpcError) -> ChatHistoryError:
    """Read gRPC's error with the details that travel in its trailing metadata."""
    code = error.code()
    info, refusal, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in _status(error).details:
        # Each is a no-op for a detail of another type.
        detail.Unpack(info)
        detail.Unpack(refusal)
        detail.Unpack(retry)
    return _CLASSES.get(code, ChatHistoryError)(
        error.details() or code.name,
        code=code,
        reason=info.reason if info.domain == DOMAIN else "",
        metadata=info.metadata,
        violations=tuple(
            FieldViolation(found.field, found.description) for found in refusal.field_violations
        ),
        retry_after=retry.retry_delay.ToTimedelta().total_seconds()
        if retry.HasField("retry_delay")
        else None,
    )


def _status(error: aio.AioRpcError) -> Status:
    trailing: Any = error.trailing_metadata()  # Pairs, whatever the types of grpc say.
    for key, value in trailing or ():
        if key == _DETAILS_KEY:
            try:
                return Status.FromString(value)
            except (
                DecodeError
            ):  # Something on the way has spoilt them; the code and the text remain.
                break
    return Status()
