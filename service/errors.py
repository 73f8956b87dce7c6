"""The errors that clients receive, independent of gRPC.

Each error carries a stable `reason` and the ids it concerns. `rpc/status.py` maps each class to a
status code. The reasons are documented in docs/reference/errors.md. No error message may contain
message text, a connection string or the text of a driver's error.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple


class FieldViolation(NamedTuple):
    """A rejected field: its path in the request, such as `messages[0].content`, and the problem."""

    field: str
    description: str


class ServiceError(Exception):
    """Base of every error that is returned to a client.

    Attributes:
        message: For developers; may change between releases.
        reason: Stable identifier in UPPER_SNAKE_CASE.
        retry_after: Seconds to wait before a retry; None when waiting does not help.
        metadata: Ids and numbers that the client's code can use.
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
    """The request is invalid. Positions such as `through_seq` are checked against stored data."""

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
        """Create the error for one rejected field."""
        return cls.fields((FieldViolation(field, description),))

    @classmethod
    def fields(cls, violations: tuple[FieldViolation, ...]) -> InvalidArgument:
        """Create the error for several rejected fields, with one entry for each field."""
        descriptions: dict[str, list[str]] = {}
        for field, description in violations:
            descriptions.setdefault(field, []).append(description)
        entries = tuple(
            FieldViolation(field, "; ".join(dict.fromkeys(problems)))
            for field, problems in descriptions.items()
        )
        suffix = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
        return cls(f"{entries[0].field}: {entries[0].description}{suffix}", violations=entries)


class NotFound(ServiceError):
    """The resource does not exist, or belongs to another user. Both look the same to the caller."""

    @classmethod
    def user(cls, user_id: str) -> NotFound:
        """Create the error for a missing user."""
        return cls("user not found", reason="USER_NOT_FOUND", user_id=user_id)

    @classmethod
    def session(cls, session_id: str) -> NotFound:
        """Create the error for a missing session."""
        return cls("session not found", reason="SESSION_NOT_FOUND", session_id=session_id)

    @classmethod
    def message_in(cls, session_id: str, message_id: str) -> NotFound:
        """Create the error for a missing message."""
        return cls(
            "message not found",
            reason="MESSAGE_NOT_FOUND",
            session_id=session_id,
            message_id=message_id,
        )

    @classmethod
    def document(cls, document_id: str) -> NotFound:
        """Create the error for a missing document."""
        return cls("document not found", reason="DOCUMENT_NOT_FOUND", document_id=document_id)


class AlreadyExists(ServiceError):
    """Another resource has the same id, or the same value of a unique field."""

    default_reason = "ID_TAKEN"


class Conflict(ServiceError):
    """A concurrent writer changed the resource. The caller should read it again and decide."""

    default_reason = "CONTENTION"


class FailedPrecondition(ServiceError):
    """The state of the resource does not allow the operation."""

    default_reason = "SESSION_ARCHIVED"


class Unauthenticated(ServiceError):
    """The caller's identity is missing or invalid."""

    default_reason = "TOKEN_INVALID"


class PermissionDenied(ServiceError):
    """The caller is not allowed to do this."""

    default_reason = "USER_MISMATCH"


class Overloaded(ServiceError):
    """A limit on concurrent work is reached. A retry after a pause may succeed."""

    default_reason = "OVERLOADED"


class TooLarge(ServiceError):
    """The request exceeds the size limit."""

    default_reason = "REQUEST_TOO_LARGE"


class Unavailable(ServiceError):
    """A dependency of the call does not respond. A retry may succeed."""

    default_reason = "DATABASE_UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    """The call's time is up."""

    default_reason = "DEADLINE_EXCEEDED"
