"""What operators see: live processes, counts of finished chunks, who holds a chunk; and bytes that had changed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_STATES = "state IN ('listing', 'running', 'done', 'cancelled', 'failed'"


def upgrade() -> None:
    op.create_table(
        "process",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("device", sa.Text(), nullable=True),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("models", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("failed_starts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind IN ('worker', 'dispatcher', 'publisher', 'reviewer', 'assist')", name="process_kind"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("kind", "host", "pid", "name", name="process_once"),
    )
    op.add_column("outcome", sa.Column("etag", sa.Text(), nullable=True))
    op.add_column("chunk", sa.Column("worker_pid", sa.BigInteger(), nullable=True))
    op.add_column("chunk", sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True))
    for count in ("labeled", "failed", "masks"):
        op.add_column("chunk", sa.Column(count, sa.BigInteger(), nullable=True))
    op.add_column("job", sa.Column("list_failing_since", sa.DateTime(timezone=True), nullable=True))
    op.add_column("job", sa.Column("list_retry_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("job", sa.Column("judged_assets", sa.BigInteger(), nullable=True))
    op.add_column("job", sa.Column("judged_failed", sa.BigInteger(), nullable=True))
    _allow_states(f"{_STATES}, 'paused')")


def downgrade() -> None:
    op.execute("UPDATE job SET state = 'cancelled' WHERE state = 'paused'")
    _allow_states(f"{_STATES})")
    for column in ("judged_failed", "judged_assets", "list_retry_at", "list_failing_since"):
        op.drop_column("job", column)
    for column in ("masks", "failed", "labeled", "claimed_at", "worker_pid"):
        op.drop_column("chunk", column)
    op.drop_column("outcome", "etag")
    op.drop_table("process")


def _allow_states(states: str) -> None:
    op.drop_constraint("job_state", "job")
    op.create_check_constraint("job_state", "job", states)
