"""Row types of the store: plain tuples, with the columns that produce them.

Ids are UUIDs in canonical text form, times are microseconds since 1970 in UTC, and JSON is text.
The database does these conversions, so that no object is created that the reply does not need.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import BigInteger, ColumnElement, FromClause, Row, Text, cast, func, literal_column

from service.errors import Conflict
from service.store.tables import chat_messages, chat_sessions, documents, users

MAX_PAGE_BYTES = 3 * 1024 * 1024
"""Maximum bytes of a page, so that a reply stays below the 4 MiB that clients accept by default."""

_FIXED_BYTES = 256
"""Bytes of a row's ids, times and numbers."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def epoch_us(column: ColumnElement[Any]) -> ColumnElement[int]:
    """Return the expression of a time in microseconds since 1970.

    It is exact until the year 2255, because a double represents integers up to 2^53.
    """
    return cast(
        func.date_part(literal_column("'epoch'"), column) * literal_column("1e6"), BigInteger
    )


def datetime_from_us(us: int) -> datetime:
    """Return the time that is `us` microseconds after 1970-01-01 UTC."""
    return _EPOCH + timedelta(microseconds=us)


def _etag(created_us: int, revision: int) -> str:
    # The creation time distinguishes the row from an earlier, deleted one with the same id.
    return f"{created_us}.{revision}"


class UserRow(NamedTuple):
    """A user, as selected by USER_COLUMNS."""

    id: str
    external_id: str | None
    email: str | None
    name: str
    metadata: str | None
    created_us: int
    updated_us: int
    revision: int
    fingerprint: bytes

    @property
    def etag(self) -> str:
        """Opaque version; every update changes it."""
        return _etag(self.created_us, self.revision)


class SessionRow(NamedTuple):
    """A session, as selected by SESSION_COLUMNS."""

    user_id: str
    id: str
    title: str
    summary: str
    summarized_through_seq: int
    metadata: str | None
    state: int
    last_seq: int
    message_count: int
    created_us: int
    updated_us: int
    revision: int
    forked_from_id: str | None
    forked_from_seq: int | None
    fingerprint: bytes

    @property
    def etag(self) -> str:
        """Opaque version; every update changes it, appends do not."""
        return _etag(self.created_us, self.revision)


class MessageRow(NamedTuple):
    """A message that is not a tombstone, as selected by MESSAGE_COLUMNS."""

    id: str
    seq: int
    role: int
    content: str
    parts: str | None
    metadata: str | None
    token_count: int | None
    token_estimate: int
    size: int
    author: str
    feedback_score: float | None
    feedback_comment: str | None
    created_us: int
    updated_us: int
    revision: int

    @property
    def etag(self) -> str:
        """Opaque version; every update changes it."""
        return _etag(self.created_us, self.revision)

    @property
    def prompt_tokens(self) -> int:
        """Tokens in a prompt: the client's `token_count`, or the estimate if there is none."""
        return self.token_estimate if self.token_count is None else self.token_count


class DocumentRow(NamedTuple):
    """A document, as selected by DOCUMENT_COLUMNS."""

    user_id: str
    id: str
    title: str
    source_uri: str
    mime_type: str
    content_sha256: bytes | None
    size_bytes: int
    chunk_count: int
    status: int
    status_detail: str
    metadata: str | None
    created_us: int
    updated_us: int
    revision: int
    fingerprint: bytes

    @property
    def etag(self) -> str:
        """Opaque version; every update changes it, appended chunks do not."""
        return _etag(self.created_us, self.revision)


def user_columns(source: FromClause) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of a UserRow, from `users` or a subquery of it."""
    user = source.c
    return (
        cast(user.id, Text),
        user.external_id,
        user.email,
        user.name,
        cast(user.metadata, Text),
        epoch_us(user.created_at),
        epoch_us(user.updated_at),
        user.revision,
        user.fingerprint,
    )


def document_columns(source: FromClause) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of a DocumentRow, from `documents` or a subquery of it."""
    document = source.c
    return (
        cast(document.user_id, Text),
        cast(document.id, Text),
        document.title,
        document.source_uri,
        document.mime_type,
        document.content_sha256,
        document.size_bytes,
        document.chunk_count,
        document.status,
        document.status_detail,
        cast(document.metadata, Text),
        epoch_us(document.created_at),
        epoch_us(document.updated_at),
        document.revision,
        document.fingerprint,
    )


def session_columns(source: FromClause) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of a SessionRow, from `chat_sessions` or a subquery of it."""
    session = source.c
    return (
        cast(session.user_id, Text),
        cast(session.id, Text),
        session.title,
        session.summary,
        session.summarized_through_seq,
        cast(session.metadata, Text),
        session.state,
        session.last_seq,
        session.message_count,
        epoch_us(session.created_at),
        epoch_us(session.updated_at),
        session.revision,
        cast(session.forked_from_id, Text),
        session.forked_from_seq,
        session.fingerprint,
    )


def message_columns(source: FromClause) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of a MessageRow, from `chat_messages` or a subquery of it."""
    message = source.c
    return (
        cast(message.id, Text),
        message.seq,
        message.role,
        message.content,
        cast(message.parts, Text),
        cast(message.metadata, Text),
        message.token_count,
        message.token_estimate,
        message.size,
        message.author,
        message.feedback_score,
        message.feedback_comment,
        epoch_us(message.created_at),
        epoch_us(message.updated_at),
        message.revision,
    )


USER_COLUMNS = user_columns(users)
SESSION_COLUMNS = session_columns(chat_sessions)
MESSAGE_COLUMNS = message_columns(chat_messages)
DOCUMENT_COLUMNS = document_columns(documents)


def _row_bytes(source: FromClause, *names: str) -> ColumnElement[int]:
    """Return the bytes of a row whose columns of variable length are these.

    JSON counts as the text that is read: jsonb stores it compressed, and renders a number as 1e308
    with 309 digits.
    """
    total: ColumnElement[int] = literal_column(str(_FIXED_BYTES))
    for name in names:
        column = source.c[name]
        text = cast(column, Text) if name == "metadata" else column
        total += func.coalesce(func.octet_length(text), literal_column("0"))
    return total


def user_bytes(source: FromClause) -> ColumnElement[int]:
    """Return the bytes of a UserRow."""
    return _row_bytes(source, "external_id", "email", "name", "metadata")


def session_bytes(source: FromClause) -> ColumnElement[int]:
    """Return the bytes of a SessionRow."""
    return _row_bytes(source, "title", "summary", "metadata")


def document_bytes(source: FromClause) -> ColumnElement[int]:
    """Return the bytes of a DocumentRow."""
    return _row_bytes(
        source, "title", "source_uri", "mime_type", "content_sha256", "status_detail", "metadata"
    )


def chunk_text_bytes(source: FromClause) -> ColumnElement[int]:
    """Return the bytes of a chunk without its vector."""
    return _row_bytes(source, "text")


def chunk_bytes(source: FromClause) -> ColumnElement[int]:
    """Return the bytes of a chunk with its vector."""
    return _row_bytes(source, "text", "vector")


RowT = TypeVar("RowT", UserRow, SessionRow, MessageRow, DocumentRow)


def row_or_none(row_type: type[RowT], row: Row[Any] | None) -> RowT | None:
    """Convert a row of a result to its row type; None stays None."""
    return None if row is None else row_type._make(row)


def check_etag(row: UserRow | SessionRow | MessageRow | DocumentRow, etag: str) -> None:
    """Compare the etag that a client sent with that of the stored row; an empty one matches.

    Raises:
        Conflict: the row was updated since the client read it (ETAG_MISMATCH).
    """
    if etag and etag != row.etag:
        raise Conflict(
            "the resource was updated after this etag was read: read it again",
            reason="ETAG_MISMATCH",
            id=row.id,
            etag=row.etag,
        )
