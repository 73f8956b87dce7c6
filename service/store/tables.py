"""The tables of the schema.

The primary keys of sessions, messages, documents and chunks begin with the owner, so that isolation
is structural: a message cannot belong to another user's session.
"""

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

BUILD = 4
"""Number of this build: the revision of its newest migration."""
REQUIRED_REVISION = 4
"""The oldest revision of the schema that this build works with."""
SCHEMA = "chathistory"
"""Schema of a new installation, and the one that the texts of statements name."""


class SessionState(IntEnum):
    """Whether a session accepts messages. The numbers are stored."""

    ACTIVE = 1
    ARCHIVED = 2


class Role(IntEnum):
    """The author's role. The numbers are stored."""

    USER = 1
    ASSISTANT = 2
    SYSTEM = 3
    TOOL = 4


class DocumentStatus(IntEnum):
    """Whether search finds a document. The numbers are stored."""

    PENDING = 1
    INDEXED = 2
    FAILED = 3


class OutboxKind(IntEnum):
    """Kind of the entity of a row in the outbox. The numbers are stored."""

    DOCUMENT = 1
    SESSION = 2
    USER = 3


OPEN_END = 2**63 - 2
"""End of the range that an append enqueues: it includes all later messages of the session.

It differs from `outbox.MAX_POSITION`, by which the rows of a rebuild are counted.
"""

metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)

# Ids are text in Python: no UUID objects are created, and the driver accepts text.
_id = Uuid(as_uuid=False)
_time = DateTime(timezone=True)
# None is stored as NULL, not as the JSON value null.
_json = JSONB(none_as_null=True)


def _stamps() -> tuple[Column[object], ...]:
    """Return the columns of every table whose rows clients create."""
    return (
        Column("created_at", _time, nullable=False, server_default=func.clock_timestamp()),
        Column("updated_at", _time, nullable=False, server_default=func.clock_timestamp()),
        # Hash of the client's request that created the row. Updates do not change it.
        Column("fingerprint", LargeBinary, nullable=False),
        # Number of updates, without appends; part of the etag.
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
    # An append changes the next two columns and updated_at. None of them is indexed, so that the
    # update stays heap-only (HOT).
    Column("last_seq", BigInteger, nullable=False, server_default=text("0")),
    Column("message_count", BigInteger, nullable=False, server_default=text("0")),
    *_stamps(),
    Column("forked_from_id", _id),
    Column("forked_from_seq", BigInteger),
    PrimaryKeyConstraint("user_id", "id"),
    ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),
    CheckConstraint("message_count BETWEEN 0 AND last_seq", name="counts"),
    # Leaves space in every page for the row versions that appends create (HOT).
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
    # Estimated from the length; used when the client sent no token_count.
    Column("token_estimate", Integer, nullable=False),
    # Approximate bytes of the message in a reply, so that a page can be cut by size before any text
    # is read.
    Column("size", Integer, nullable=False),
    Column("author", Text, nullable=False, server_default=""),
    Column("feedback_score", Double),
    Column("feedback_comment", Text),
    *_stamps(),
    # Set for a tombstone. It keeps id, seq and fingerprint, so that a late retry of the append does
    # not restore the message.
    Column("deleted_at", _time),
    PrimaryKeyConstraint("user_id", "session_id", "seq"),
    UniqueConstraint("user_id", "session_id", "id"),
    ForeignKeyConstraint(
        ["user_id", "session_id"], ["chat_sessions.user_id", "chat_sessions.id"], ondelete="CASCADE"
    ),
    CheckConstraint("seq > 0", name="seq"),
)

# Sessions that were deleted, so that a late retry of the append that started one does not restore
# it. `session_tombstones.py` explains the rows. The table has no foreign key, because a tombstone
# must remain when its user is deleted: a user with the same id may be created again.
session_tombstones = Table(
    "session_tombstones",
    metadata,
    Column("user_id", _id, nullable=False),
    Column("session_id", _id, nullable=False),
    Column("deleted_at", _time, nullable=False),
    PrimaryKeyConstraint("user_id", "session_id"),
    # The purge deletes the oldest rows of all users.
    Index("session_tombstones_deleted_at_idx", "deleted_at"),
)

documents = Table(
    "documents",
    metadata,
    # SYSTEM_USER_ID for shared documents.
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
    # Documents without a hash have NULL, and are all distinct.
    Index("documents_content_key", "user_id", "content_sha256", "source_uri", unique=True),
)

document_chunks = Table(
    "document_chunks",
    metadata,
    Column("user_id", _id, nullable=False),
    Column("document_id", _id, nullable=False),
    Column("chunk_index", Integer, nullable=False),
    Column("text", Text, nullable=False),
    # The client's vector (32-bit floats, little-endian), stored because the index must be
    # rebuildable from this table. NULL: the service embeds the text.
    Column("vector", LargeBinary),
    PrimaryKeyConstraint("user_id", "document_id", "chunk_index"),
    ForeignKeyConstraint(
        ["user_id", "document_id"], ["documents.user_id", "documents.id"], ondelete="CASCADE"
    ),
    CheckConstraint("chunk_index >= 0", name="chunk_index"),
)

# Changes that the search index does not have yet: one row for each entity. It has no foreign key,
# because a row must exist after its entity is deleted. `outbox/outbox.py` explains the columns.
search_outbox = Table(
    "search_outbox",
    metadata,
    Column("kind", SmallInteger, nullable=False),
    Column("user_id", _id, nullable=False),
    Column("entity_id", _id, nullable=False),
    # Number of changes. A finished row is deleted only if it has not changed since the claim.
    Column("version", BigInteger, nullable=False, server_default=text("1")),
    # The chunks (by index) or messages (by seq) that have changed, and whether orphaned points may
    # remain in the index.
    Column("since", BigInteger, nullable=False),
    Column("through", BigInteger, nullable=False),
    Column("wipe", Boolean, nullable=False, server_default=false()),
    # The same for the current lease: the claim has moved them here from the columns above.
    Column("taken_since", BigInteger),
    Column("taken_through", BigInteger),
    Column("taken_wipe", Boolean, nullable=False, server_default=false()),
    # Time of the oldest change that is not indexed, from which the lag is computed.
    Column("owed_at", _time, nullable=False, server_default=func.clock_timestamp()),
    # When the row can be claimed: the end of a lease or of a back-off; infinity for a dead letter.
    Column("due_at", _time, nullable=False, server_default=func.clock_timestamp()),
    Column("lease_id", _id),
    Column("attempts", SmallInteger, nullable=False, server_default=text("0")),
    Column("detail", Text, nullable=False, server_default=""),
    PrimaryKeyConstraint("kind", "user_id", "entity_id"),
    Index("search_outbox_due_at_idx", "due_at"),
    # Rows are short-lived: vacuum by their number, and leave space for updates in place (HOT).
    postgresql_with={
        "fillfactor": 50,
        "autovacuum_vacuum_scale_factor": 0,
        "autovacuum_vacuum_threshold": 5000,
    },
)

search_indexes = Table(
    "search_indexes",
    metadata,
    # One row for each index that was ever built, with the state of its rebuild.
    Column("alias", Text, nullable=False),
    # The collection that is being built, as the first or next to the live one. All changes are
    # written to it too.
    Column("building", Text),
    # The entity that the rebuild has enqueued last, and the number of those enqueued.
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
    # One row: the oldest build that works with this schema. Only contracting migrations raise it.
    Column("id", Integer, nullable=False, server_default=text("1")),
    Column("min_build", Integer, nullable=False),
    PrimaryKeyConstraint("id"),
    CheckConstraint("id = 1", name="single"),
)

history_epoch = Table(
    "history_epoch",
    metadata,
    # One row: the epoch of the history, and a counter that rises with the traffic. `epoch.py`
    # explains them.
    Column("id", Integer, nullable=False, server_default=text("1")),
    Column("epoch", _id, nullable=False, server_default=text("gen_random_uuid()")),
    Column("counter", BigInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("id"),
    CheckConstraint("id = 1", name="single"),
    # Leaves space for the row versions of the counter (HOT).
    postgresql_with={"fillfactor": 10},
)
