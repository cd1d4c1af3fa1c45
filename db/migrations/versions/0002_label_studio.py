"""What was published to Label Studio: ls_task, ls_prediction."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ls_task",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("server", sa.Text(), nullable=False),
        sa.Column("project_id", sa.BigInteger(), nullable=False),
        sa.Column("asset_uid", sa.Text(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("task_id", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("server", "project_id", "asset_uid", name="ls_task_once_a_project"),
        sa.UniqueConstraint("server", "project_id", "task_id", name="ls_task_of_one_asset"),
    )
    op.create_table(
        "ls_prediction",
        sa.Column("ls_task_id", sa.BigInteger(), nullable=False),
        sa.Column("model_version", sa.Text(), nullable=False),
        sa.Column("asset_id", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), server_default="sending", nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("mask_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("left_out", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("iou_sum", sa.REAL(), server_default=sa.text("0"), nullable=False),
        sa.Column("iou_min", sa.REAL(), nullable=True),
        sa.Column("sent_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('sending', 'done', 'refused')", name="ls_prediction_state"),
        sa.ForeignKeyConstraint(["ls_task_id"], ["ls_task.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("ls_task_id", "model_version"),
    )
    op.create_index("ls_prediction_of_asset", "ls_prediction", ["asset_id"], unique=False)
    op.create_index("ls_prediction_of_job", "ls_prediction", ["job_id"], unique=False)


def downgrade() -> None:
    op.drop_table("ls_prediction")
    op.drop_table("ls_task")
