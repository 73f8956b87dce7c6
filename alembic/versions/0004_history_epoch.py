"""The epoch of the history, which shows that the database has gone back in time."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "history_epoch",
        sa.Column("id", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column(
            "epoch",
            sa.Uuid(as_uuid=False),
            server_default=sa.text("gen_random_uuid()"),
            nullable=False,
        ),
        sa.Column("counter", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("history_epoch_pkey")),
        sa.CheckConstraint("id = 1", name=op.f("history_epoch_single_check")),
        # Leaves space for the row versions of the counter (HOT).
        postgresql_with={"fillfactor": 10},
    )
    op.execute("INSERT INTO history_epoch DEFAULT VALUES")


def downgrade() -> None:
    op.drop_table("history_epoch")
