"""What can go wrong, in the words of the contract; knows nothing of gRPC.

Each error carries the stable `reason` of the contract's table and the ids it is about. `rpc/status.py` holds the one
table that maps a class to a status code. No error's text may hold message text, a connection string or a driver's words.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple


class FieldViolation(NamedTuple):
    """One refused field: its path in the request, such as `messages[0].content`, and what is wrong with it."""

    field: str
    description: str


class ServiceError(Exception):
    """Base of every error that a client is told about.

    `reason` is stable and in UPPER_SNAKE, `metadata` holds ids and numbers for the client's program, `retry_after` is
    in seconds and set where waiting helps.
    """

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retry_after: float | None = None,
        **metadata: str | int,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.retry_after = retry_after
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidArgument(ServiceError):
    """The request itself is wrong, whatever is stored."""

    default_reason = "FIELD_VIOLATION"

    def __init__(
        self,
        message: str,
        *,
        violations: tuple[FieldViolation, ...] = (),
        reason: str | None = None,
    ) -> None:
        super().__init__(message, reason=reason)
        self.violations = violations

    @classmethod
    def field(cls, field: str, description: str) -> InvalidArgument:
        """Make the error for one refused field."""
        return cls.fields((FieldViolation(field, description),))

    @classmethod
    def fields(cls, violations: tuple[FieldViolation, ...]) -> InvalidArgument:
        """Make the error for several refused fields; what is wrong with one field is said in one entry."""
        words: dict[str, list[str]] = {}
        for field, description in violations:
            words.setdefault(field, []).append(description)
        entries = tuple(
            FieldViolation(field, "; ".join(dict.fromkeys(each))) for field, each in words.items()
        )
        more = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
        return cls(f"{entries[0].field}: {entries[0].description}{more}", violations=entries)


class NotFound(ServiceError):
    """The thing is missing, or belongs to somebody else: nobody can tell which."""

    @classmethod
    def user(cls, user_id: str) -> NotFound:
        """Make the error for a missing user."""
        return cls("user not found", reason="USER_NOT_FOUND", user_id=user_id)

    @classmethod
    def session(cls, session_id: str) -> NotFound:
        """Make the error for a missing session."""
        return cls("session not found", reason="SESSION_NOT_FOUND", session_id=session_id)

    @classmethod
    def message_in(cls, session_id: str, message_id: str) -> NotFound:
        """Make the error for a missing message."""
        return cls(
            "message not found",
            reason="MESSAGE_NOT_FOUND",
            session_id=session_id,
            message_id=message_id,
        )

    @classmethod
    def document(cls, document_id: str) -> NotFound:
        """Make the error for a missing document."""
        return cls("document not found", reason="DOCUMENT_NOT_FOUND", document_id=document_id)


class AlreadyExists(ServiceError):
    """The id or another unique value is taken by something else."""

    default_reason = "ID_TAKEN"


class Conflict(ServiceError):
    """Somebody else has changed the thing meanwhile; read it again and decide."""

    default_reason = "CONTENTION"


class FailedPrecondition(ServiceError):
    """The thing is not in a state that allows this."""

    default_reason = "SESSION_ARCHIVED"


class Unauthenticated(ServiceError):
    """The caller has not shown who it is."""

    default_reason = "TOKEN_INVALID"


class PermissionDenied(ServiceError):
    """The caller may not do this."""

    default_reason = "USER_MISMATCH"


class Overloaded(ServiceError):
    """More work is waiting than can be carried; try again after a pause."""

    default_reason = "OVERLOADED"


class TooLarge(ServiceError):
    """The request is larger than the service takes."""

    default_reason = "REQUEST_TOO_LARGE"


class Unavailable(ServiceError):
    """Something that the call needs does not answer now; a retry may succeed."""

    default_reason = "DATABASE_UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    """The call's time is up."""

    default_reason = "DEADLINE_EXCEEDED"
