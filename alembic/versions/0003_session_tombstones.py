"""Tombstones of deleted sessions."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "session_tombstones",
        sa.Column("user_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("session_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "session_id", name=op.f("session_tombstones_pkey")),
    )
    op.create_index("session_tombstones_deleted_at_idx", "session_tombstones", ["deleted_at"])


def downgrade() -> None:
    op.drop_table("session_tombstones")
