"""Documents, their chunks, and the outbox of the search index."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"

ID = sa.Uuid(as_uuid=False)
TIME = sa.DateTime(timezone=True)
NOW = sa.text("clock_timestamp()")


def upgrade() -> None:
    op.create_table(
        "documents",
        sa.Column("user_id", ID, nullable=False),
        sa.Column("id", ID, nullable=False),
        sa.Column("title", sa.Text(), server_default="", nullable=False),
        sa.Column("source_uri", sa.Text(), server_default="", nullable=False),
        sa.Column("mime_type", sa.Text(), server_default="", nullable=False),
        sa.Column("content_sha256", sa.LargeBinary()),
        sa.Column("size_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("chunk_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("status", sa.SmallInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("status_detail", sa.Text(), server_default="", nullable=False),
        sa.Column("metadata", JSONB()),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.Column("updated_at", TIME, server_default=NOW, nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("revision", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("documents_user_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("user_id", "id", name=op.f("documents_pkey")),
    )
    op.create_index(
        "documents_user_id_created_at_idx", "documents", ["user_id", "created_at", "id"]
    )
    op.create_index(
        "documents_content_key",
        "documents",
        ["user_id", "content_sha256", "source_uri"],
        unique=True,
    )
    op.create_table(
        "document_chunks",
        sa.Column("user_id", ID, nullable=False),
        sa.Column("document_id", ID, nullable=False),
        sa.Column("chunk_index", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("vector", sa.LargeBinary()),
        sa.CheckConstraint("chunk_index >= 0", name=op.f("document_chunks_chunk_index_check")),
        sa.ForeignKeyConstraint(
            ["user_id", "document_id"],
            ["documents.user_id", "documents.id"],
            name=op.f("document_chunks_user_id_document_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "user_id", "document_id", "chunk_index", name=op.f("document_chunks_pkey")
        ),
    )
    op.create_table(
        "search_outbox",
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("entity_id", ID, nullable=False),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("through", sa.BigInteger(), nullable=False),
        sa.Column("wipe", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("taken_since", sa.BigInteger()),
        sa.Column("taken_through", sa.BigInteger()),
        sa.Column("taken_wipe", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("owed_at", TIME, server_default=NOW, nullable=False),
        sa.Column("due_at", TIME, server_default=NOW, nullable=False),
        sa.Column("lease_id", ID),
        sa.Column("attempts", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("detail", sa.Text(), server_default="", nullable=False),
        sa.PrimaryKeyConstraint("kind", "user_id", "entity_id", name=op.f("search_outbox_pkey")),
        postgresql_with={
            "fillfactor": 50,
            "autovacuum_vacuum_scale_factor": 0,
            "autovacuum_vacuum_threshold": 5000,
        },
    )
    op.create_index("search_outbox_due_at_idx", "search_outbox", ["due_at"])
    op.create_table(
        "search_indexes",
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("building", sa.Text()),
        sa.Column("after_kind", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "after_user_id",
            ID,
            server_default=sa.text("'00000000-0000-0000-0000-000000000000'"),
            nullable=False,
        ),
        sa.Column(
            "after_entity_id",
            ID,
            server_default=sa.text("'00000000-0000-0000-0000-000000000000'"),
            nullable=False,
        ),
        sa.Column("handed_out", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("total", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_id", ID),
        sa.Column("lease_until", TIME),
        sa.PrimaryKeyConstraint("alias", name=op.f("search_indexes_pkey")),
    )


def downgrade() -> None:
    op.drop_table("search_indexes")
    op.drop_table("search_outbox")
    op.drop_table("document_chunks")
    op.drop_table("documents")
