"""The errors that clients receive, independent of gRPC.

Each error carries a stable `reason` and the ids it concerns. `rpc/status.py` maps each class to a
status code. The reasons are documented in docs/reference/errors.md. No error message may contain
message text, a connection string or the text of a driver's error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

# An error is sent in HTTP/2 trailers, of which clients accept 8 KiB. Its message is sent twice:
# percent-encoded, where a byte may take three, and in the details, where three bytes take four.
MAX_MESSAGE_BYTES = 320
MAX_VIOLATIONS = 20
"""Rejected fields that are named. The others are only counted."""
MAX_VIOLATIONS_BYTES = 2_000
"""Bytes of the violations together. The first one is always sent."""
MAX_PATH_BYTES = 200
MAX_DESCRIPTION_BYTES = 400
MAX_PROBLEMS_PER_FIELD = 5
MAX_METADATA_BYTES = 128
"""Bytes of one value of an error's metadata."""


class FieldViolation(NamedTuple):
    """A rejected field: its path in the request, such as `messages[0].content`, and the problem."""

    field: str
    description: str


def shorten(text: str, max_bytes: int) -> str:
    """Return a text that takes at most `max_bytes` in UTF-8; a longer one is cut, and ends in …."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= max_bytes:
        return text
    ellipsis = "…"
    return encoded[: max_bytes - len(ellipsis.encode())].decode(errors="ignore") + ellipsis


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
        self.message = shorten(message, MAX_MESSAGE_BYTES)
        self.reason = reason or self.default_reason
        self.retry_after = retry_after
        self.metadata = {
            key: shorten(str(value), MAX_METADATA_BYTES) for key, value in metadata.items()
        }


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
        self.violations = tuple(_fitting(violations))

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
            FieldViolation(field, _join(problems)) for field, problems in descriptions.items()
        )
        suffix = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
        return cls(f"{entries[0].field}: {entries[0].description}{suffix}", violations=entries)


def _join(problems: list[str]) -> str:
    """Join the descriptions of one field's problems: the first ones, and the number of others."""
    distinct = list(dict.fromkeys(problems))
    more_count = len(distinct) - MAX_PROBLEMS_PER_FIELD
    shown = distinct if more_count <= 0 else distinct[:MAX_PROBLEMS_PER_FIELD]
    suffix = f"; and {more_count} more" if more_count > 0 else ""
    max_bytes = (MAX_DESCRIPTION_BYTES - len(suffix)) // len(shown) - len("; ")
    return "; ".join(shorten(problem, max_bytes) for problem in shown) + suffix


def _fitting(violations: Iterable[FieldViolation]) -> Iterator[FieldViolation]:
    """Yield the violations that fit into a status, shortened, and at least the first one."""
    total_bytes = 0
    for count, (field, description) in enumerate(violations):
        violation = FieldViolation(
            shorten(field, MAX_PATH_BYTES), shorten(description, MAX_DESCRIPTION_BYTES)
        )
        total_bytes += sum(len(text.encode()) for text in violation)
        if count == MAX_VIOLATIONS or (count and total_bytes > MAX_VIOLATIONS_BYTES):
            return
        yield violation


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


class OutOfRange(ServiceError):
    """A position of the caller is beyond what the database holds, or names other data."""

    default_reason = "HISTORY_RESTORED"

    @classmethod
    def history_restored(cls, session_id: str, last_seq: int) -> OutOfRange:
        """Create the error for a session that has lost messages which its watcher has received."""
        return cls(
            "the session does not hold what was received: the database was restored to an earlier "
            "state, or after_seq is wrong; list the messages again, and watch from the last one",
            session_id=session_id,
            last_seq=last_seq,
        )


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
