"""Users, sessions and messages."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

ID = sa.Uuid(as_uuid=False)
TIME = sa.DateTime(timezone=True)
NOW = sa.text("clock_timestamp()")


def upgrade() -> None:
    op.create_table(
        "schema_info",
        sa.Column("id", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("min_build", sa.Integer(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("schema_info_single_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("schema_info_pkey")),
    )
    op.create_table(
        "users",
        sa.Column("id", ID, nullable=False),
        sa.Column("external_id", sa.Text()),
        sa.Column("email", sa.Text()),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column("metadata", JSONB()),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.Column("updated_at", TIME, server_default=NOW, nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("revision", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("users_pkey")),
        sa.UniqueConstraint("external_id", name=op.f("users_external_id_key")),
    )
    op.create_index("users_email_key", "users", [sa.literal_column("lower(email)")], unique=True)
    op.create_table(
        "chat_sessions",
        sa.Column("user_id", ID, nullable=False),
        sa.Column("id", ID, nullable=False),
        sa.Column("title", sa.Text(), server_default="", nullable=False),
        sa.Column("summary", sa.Text(), server_default="", nullable=False),
        sa.Column(
            "summarized_through_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False
        ),
        sa.Column("metadata", JSONB()),
        sa.Column("state", sa.SmallInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("message_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.Column("updated_at", TIME, server_default=NOW, nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("revision", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("forked_from_id", ID),
        sa.Column("forked_from_seq", sa.BigInteger()),
        sa.CheckConstraint(
            "message_count BETWEEN 0 AND last_seq", name=op.f("chat_sessions_counts_check")
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("chat_sessions_user_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("user_id", "id", name=op.f("chat_sessions_pkey")),
        postgresql_with={"fillfactor": 50},
    )
    op.create_table(
        "chat_messages",
        sa.Column("user_id", ID, nullable=False),
        sa.Column("session_id", ID, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("id", ID, nullable=False),
        sa.Column("role", sa.SmallInteger(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("parts", JSONB()),
        sa.Column("metadata", JSONB()),
        sa.Column("token_count", sa.Integer()),
        sa.Column("token_estimate", sa.Integer(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("author", sa.Text(), server_default="", nullable=False),
        sa.Column("feedback_score", sa.Double()),
        sa.Column("feedback_comment", sa.Text()),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.Column("updated_at", TIME, server_default=NOW, nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("revision", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("deleted_at", TIME),
        sa.CheckConstraint("seq > 0", name=op.f("chat_messages_seq_check")),
        sa.ForeignKeyConstraint(
            ["user_id", "session_id"],
            ["chat_sessions.user_id", "chat_sessions.id"],
            name=op.f("chat_messages_user_id_session_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("user_id", "session_id", "seq", name=op.f("chat_messages_pkey")),
        sa.UniqueConstraint(
            "user_id", "session_id", "id", name=op.f("chat_messages_user_id_session_id_id_key")
        ),
    )
    op.execute("INSERT INTO schema_info (min_build) VALUES (1)")
    # The system's own user, which owns the shared documents.
    op.execute(
        "INSERT INTO users (id, fingerprint) VALUES ('00000000-0000-0000-0000-000000000000', '')"
    )


def downgrade() -> None:
    op.drop_table("chat_messages")
    op.drop_table("chat_sessions")
    op.drop_table("users")
    op.drop_table("schema_info")
