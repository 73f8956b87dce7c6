"""The schema. Every table of a user's things begins its key with the owner, so that isolation is structural."""

from __future__ import annotations

from enum import IntEnum

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

BUILD = 1
"""This build's number: the revision of the newest migration it knows."""
REQUIRED_REVISION = 1
"""The oldest schema revision that this build works with."""

SYSTEM_USER_ID = "00000000-0000-0000-0000-000000000000"
"""Owner of what belongs to nobody in particular (shared documents); no caller can be it."""


class State(IntEnum):
    """Whether a session takes messages; the numbers are stored."""

    ACTIVE = 1
    ARCHIVED = 2


class Role(IntEnum):
    """Who speaks; the numbers are stored."""

    USER = 1
    ASSISTANT = 2
    SYSTEM = 3
    TOOL = 4


metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)

# Ids are text outside the database: no UUID object is made on the way, and the driver takes both.
_id = Uuid(as_uuid=False)
_time = DateTime(timezone=True)


def _stamps() -> tuple[Column[object], ...]:
    """Columns of everything that a client creates."""
    return (
        Column("created_at", _time, nullable=False, server_default=func.clock_timestamp()),
        Column("updated_at", _time, nullable=False, server_default=func.clock_timestamp()),
        # Hash of what the client sent when it created the row; an update leaves it.
        Column("fingerprint", LargeBinary, nullable=False),
        # Counts updates, appends not among them; the etag is made of it.
        Column("revision", Integer, nullable=False, server_default=text("1")),
    )


users = Table(
    "users",
    metadata,
    Column("id", _id, nullable=False),
    Column("external_id", Text),
    Column("email", Text),
    Column("name", Text, nullable=False, server_default=""),
    Column("metadata", JSONB),
    *_stamps(),
    PrimaryKeyConstraint("id"),
    UniqueConstraint("external_id"),
)
Index("users_email_key", func.lower(users.c.email), unique=True)

chat_sessions = Table(
    "chat_sessions",
    metadata,
    Column("user_id", _id, nullable=False),
    Column("id", _id, nullable=False),
    Column("title", Text, nullable=False, server_default=""),
    Column("summary", Text, nullable=False, server_default=""),
    Column("summarized_through_seq", BigInteger, nullable=False, server_default=text("0")),
    Column("metadata", JSONB),
    Column("state", SmallInteger, nullable=False, server_default=text(str(int(State.ACTIVE)))),
    # The next three change at every append: not indexed, so that the update stays heap-only.
    Column("last_seq", BigInteger, nullable=False, server_default=text("0")),
    Column("message_count", BigInteger, nullable=False, server_default=text("0")),
    *_stamps(),
    Column("forked_from_id", _id),
    Column("forked_from_seq", BigInteger),
    PrimaryKeyConstraint("user_id", "id"),
    ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),
    CheckConstraint("message_count BETWEEN 0 AND last_seq", name="counts"),
    # Room in every page for the new version of a row that an append updates (HOT).
    postgresql_with={"fillfactor": 50},
)

chat_messages = Table(
    "chat_messages",
    metadata,
    Column("user_id", _id, nullable=False),
    Column("session_id", _id, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("id", _id, nullable=False),
    Column("role", SmallInteger, nullable=False),
    Column("content", Text, nullable=False),
    Column("parts", JSONB),
    Column("metadata", JSONB),
    Column("token_count", Integer),
    # What token_count would be, guessed from the length; used where the client gave none.
    Column("token_estimate", Integer, nullable=False),
    # Roughly the bytes of the message in a reply, so that a page can be cut by size before anything large is read.
    Column("size", Integer, nullable=False),
    Column("author", Text, nullable=False, server_default=""),
    Column("feedback_score", Double),
    Column("feedback_comment", Text),
    *_stamps(),
    # Set: a tombstone, which keeps id, seq and fingerprint so that a late retry cannot bring the message back.
    Column("deleted_at", _time),
    PrimaryKeyConstraint("user_id", "session_id", "seq"),
    UniqueConstraint("user_id", "session_id", "id"),
    ForeignKeyConstraint(["user_id", "session_id"], ["chat_sessions.user_id", "chat_sessions.id"], ondelete="CASCADE"),
    CheckConstraint("seq > 0", name="seq"),
)

schema_info = Table(
    "schema_info",
    metadata,
    # One row. The oldest build that works with this schema: only a contracting migration raises it.
    Column("id", Integer, nullable=False, server_default=text("1")),
    Column("min_build", Integer, nullable=False),
    PrimaryKeyConstraint("id"),
    CheckConstraint("id = 1", name="single"),
)
