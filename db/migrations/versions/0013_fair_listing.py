"""A job's priority, and the ranges of keys of a source that is listed in parallel."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # With a constant default no row is written. A command of an older version makes jobs of the usual priority.
    op.add_column("job", sa.Column("priority", sa.Integer(), server_default=sa.text("5"), nullable=False))
    op.create_check_constraint("job_priority", "job", "priority BETWEEN 1 AND 9")
    op.create_table(
        "list_shard",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("cursor", sa.Text(collation="C"), nullable=False),
        sa.Column("upto", sa.Text(collation="C"), nullable=True),
        sa.Column("is_done", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "n"),
    )


def downgrade() -> None:
    op.drop_table("list_shard")
    op.drop_constraint("job_priority", "job")
    op.drop_column("job", "priority")
