"""The schema. Every table of a user's things begins its key with the owner, so that isolation is structural."""

from __future__ import annotations

from enum import IntEnum

from sqlalchemy import (
    BigInteger,
    Boolean,
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
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from service.ids import SYSTEM_USER_ID

BUILD = 2
"""This build's number: the revision of the newest migration it knows."""
REQUIRED_REVISION = 2
"""The oldest schema revision that this build works with."""


class SessionState(IntEnum):
    """Whether a session takes messages; the numbers are stored."""

    ACTIVE = 1
    ARCHIVED = 2


class Role(IntEnum):
    """Who speaks; the numbers are stored."""

    USER = 1
    ASSISTANT = 2
    SYSTEM = 3
    TOOL = 4


class DocumentStatus(IntEnum):
    """Whether search finds a document; the numbers are stored."""

    PENDING = 1
    INDEXED = 2
    FAILED = 3


class OutboxKind(IntEnum):
    """What a row of the outbox is about; the numbers are stored."""

    DOCUMENT = 1
    SESSION = 2
    USER = 3


OPEN_END = 2**63 - 2
"""Of a range in the outbox: from there on, whatever comes. Another number than a rebuilding's, which is beyond it."""

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
# None is NULL, not the word of JSON.
_json = JSONB(none_as_null=True)


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
    Column("metadata", _json),
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
    Column("metadata", _json),
    Column(
        "state", SmallInteger, nullable=False, server_default=text(str(int(SessionState.ACTIVE)))
    ),
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
    Column("parts", _json),
    Column("metadata", _json),
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
    ForeignKeyConstraint(
        ["user_id", "session_id"], ["chat_sessions.user_id", "chat_sessions.id"], ondelete="CASCADE"
    ),
    CheckConstraint("seq > 0", name="seq"),
)

documents = Table(
    "documents",
    metadata,
    # The nil UUID for shared ones.
    Column("user_id", _id, nullable=False),
    Column("id", _id, nullable=False),
    Column("title", Text, nullable=False, server_default=""),
    Column("source_uri", Text, nullable=False, server_default=""),
    Column("mime_type", Text, nullable=False, server_default=""),
    Column("content_sha256", LargeBinary),
    Column("size_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("chunk_count", Integer, nullable=False, server_default=text("0")),
    Column(
        "status",
        SmallInteger,
        nullable=False,
        server_default=text(str(int(DocumentStatus.PENDING))),
    ),
    Column("status_detail", Text, nullable=False, server_default=""),
    Column("metadata", _json),
    *_stamps(),
    PrimaryKeyConstraint("user_id", "id"),
    ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),
    Index("documents_user_id_created_at_idx", "user_id", "created_at", "id"),
    # Those without a hash are NULL, and all different.
    Index("documents_content_key", "user_id", "content_sha256", "source_uri", unique=True),
)

document_chunks = Table(
    "document_chunks",
    metadata,
    Column("user_id", _id, nullable=False),
    Column("document_id", _id, nullable=False),
    Column("chunk_index", Integer, nullable=False),
    Column("text", Text, nullable=False),
    # What the client gave (32-bit floats, little-endian): the index must be rebuildable from here. NULL: made of the text.
    Column("vector", LargeBinary),
    PrimaryKeyConstraint("user_id", "document_id", "chunk_index"),
    ForeignKeyConstraint(
        ["user_id", "document_id"], ["documents.user_id", "documents.id"], ondelete="CASCADE"
    ),
    CheckConstraint("chunk_index >= 0", name="chunk_index"),
)

# What the search index still owes: one row an entity, without text, and without a foreign key, since it outlives what it is about.
search_outbox = Table(
    "search_outbox",
    metadata,
    Column("kind", SmallInteger, nullable=False),
    Column("user_id", _id, nullable=False),
    Column("entity_id", _id, nullable=False),
    # Counts changes: the row goes only if nothing has changed since it was taken.
    Column("version", BigInteger, nullable=False, server_default=text("1")),
    # Which chunks (by index) or messages (by seq) have changed, and whether points may be left that nothing stands behind.
    Column("since", BigInteger, nullable=False),
    Column("through", BigInteger, nullable=False),
    Column("wipe", Boolean, nullable=False, server_default=false()),
    # The same of a lease under way: what it has taken off the columns above.
    Column("taken_since", BigInteger),
    Column("taken_through", BigInteger),
    Column("taken_wipe", Boolean, nullable=False, server_default=false()),
    # When the oldest change came that is not indexed: the lag.
    Column("owed_at", _time, nullable=False, server_default=func.clock_timestamp()),
    # When it may be taken: the end of a lease or of a pause; infinity when it was given up.
    Column("due_at", _time, nullable=False, server_default=func.clock_timestamp()),
    Column("lease_id", _id),
    Column("attempts", SmallInteger, nullable=False, server_default=text("0")),
    Column("detail", Text, nullable=False, server_default=""),
    PrimaryKeyConstraint("kind", "user_id", "entity_id"),
    Index("search_outbox_due_at_idx", "due_at"),
    # Rows come and go: vacuumed by their number, and updated in place (HOT).
    postgresql_with={
        "fillfactor": 50,
        "autovacuum_vacuum_scale_factor": 0,
        "autovacuum_vacuum_threshold": 5000,
    },
)

search_indexes = Table(
    "search_indexes",
    metadata,
    # One row an index that was ever built, and how far its rebuilding is.
    Column("alias", Text, nullable=False),
    # The collection that is filled now, beside the live one or as the first; all changes go to it too.
    Column("building", Text),
    # The last entity that was handed to the outbox.
    Column("after_kind", SmallInteger, nullable=False, server_default=text("0")),
    Column("after_user_id", _id, nullable=False, server_default=text(f"'{SYSTEM_USER_ID}'")),
    Column("after_entity_id", _id, nullable=False, server_default=text(f"'{SYSTEM_USER_ID}'")),
    Column("handed_out", BigInteger, nullable=False, server_default=text("0")),
    Column("total", BigInteger, nullable=False, server_default=text("0")),
    Column("lease_id", _id),
    Column("lease_until", _time),
    PrimaryKeyConstraint("alias"),
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
