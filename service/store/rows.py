"""What the store hands out: rows as plain tuples, with the columns that make them.

Ids are canonical UUID text, times are microseconds since 1970 in UTC, JSON is text: nothing is made on the way from the driver that
the wire does not need.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import BigInteger, ColumnElement, FromClause, Row, Text, cast, func, literal_column

from service.errors import Conflict
from service.store.tables import chat_messages, chat_sessions, documents, users

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def epoch_us(column: ColumnElement[Any]) -> ColumnElement[int]:
    """Return a time as microseconds since 1970: exact, since a double holds 2^53 of them (until the year 2255)."""
    return cast(
        func.date_part(literal_column("'epoch'"), column) * literal_column("1e6"), BigInteger
    )


def datetime_from_us(us: int) -> datetime:
    """Return the time of so many microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=us)


def _etag(created_us: int, revision: int) -> str:
    # The time of creation tells a thing from another that had the same id before.
    return f"{created_us}.{revision}"


class UserRow(NamedTuple):
    """A user, by USER_COLUMNS."""

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
        """Opaque version: changes at every update."""
        return _etag(self.created_us, self.revision)


class SessionRow(NamedTuple):
    """A session, by SESSION_COLUMNS."""

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
        """Opaque version: changes at every update, not by appends."""
        return _etag(self.created_us, self.revision)


class MessageRow(NamedTuple):
    """A message that can be read, by MESSAGE_COLUMNS."""

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
        """Opaque version: changes at every update."""
        return _etag(self.created_us, self.revision)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens it takes in a prompt: counted by the client, or else estimated."""
        return self.token_estimate if self.token_count is None else self.token_count


class DocumentRow(NamedTuple):
    """A document, by DOCUMENT_COLUMNS."""

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
        """Opaque version: changes at every update, not by chunks."""
        return _etag(self.created_us, self.revision)


_u, _d = users.c, documents.c

USER_COLUMNS = (
    cast(_u.id, Text), _u.external_id, _u.email, _u.name, cast(_u.metadata, Text), epoch_us(_u.created_at), epoch_us(_u.updated_at),
    _u.revision, _u.fingerprint,
)  # fmt: skip

DOCUMENT_COLUMNS = (
    cast(_d.user_id, Text), cast(_d.id, Text), _d.title, _d.source_uri, _d.mime_type, _d.content_sha256, _d.size_bytes, _d.chunk_count,
    _d.status, _d.status_detail, cast(_d.metadata, Text), epoch_us(_d.created_at), epoch_us(_d.updated_at), _d.revision, _d.fingerprint,
)  # fmt: skip


def session_columns(source: FromClause) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of a SessionRow, from the table or a subquery of it."""
    s = source.c
    return (
        cast(s.user_id, Text), cast(s.id, Text), s.title, s.summary, s.summarized_through_seq, cast(s.metadata, Text), s.state,
        s.last_seq, s.message_count, epoch_us(s.created_at), epoch_us(s.updated_at), s.revision, cast(s.forked_from_id, Text),
        s.forked_from_seq, s.fingerprint,
    )  # fmt: skip


def message_columns(source: FromClause) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of a MessageRow, from the table or a subquery of it."""
    m = source.c
    return (
        cast(m.id, Text), m.seq, m.role, m.content, cast(m.parts, Text), cast(m.metadata, Text), m.token_count, m.token_estimate,
        m.size, m.author, m.feedback_score, m.feedback_comment, epoch_us(m.created_at), epoch_us(m.updated_at), m.revision,
    )  # fmt: skip


SESSION_COLUMNS = session_columns(chat_sessions)
MESSAGE_COLUMNS = message_columns(chat_messages)

R = TypeVar("R", UserRow, SessionRow, MessageRow, DocumentRow)


def row_or_none(kind: type[R], row: Row[Any] | None) -> R | None:
    """Make a typed row of a result's row."""
    return None if row is None else kind._make(row)


def check_etag(row: UserRow | SessionRow | MessageRow | DocumentRow, etag: str) -> None:
    """Compare an etag that a client sent back.

    Raises:
        Conflict: when the thing has been updated since (ETAG_MISMATCH).
    """
    if etag and etag != row.etag:
        raise Conflict(
            "it has been changed meanwhile; read it again",
            reason="ETAG_MISMATCH",
            id=row.id,
            etag=row.etag,
        )
