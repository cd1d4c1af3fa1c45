"""What people made of the predictions: ls_pull, ls_annotation, ls_region."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ls_pull",
        sa.Column("server", sa.Text(), nullable=False),
        sa.Column("project_id", sa.BigInteger(), nullable=False),
        sa.Column("watermark", sa.DateTime(timezone=True), nullable=False),
        sa.Column("pulled_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("server", "project_id"),
    )
    op.create_table(
        "ls_annotation",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("ls_task_id", sa.BigInteger(), nullable=False),
        sa.Column("annotation_id", sa.BigInteger(), nullable=False),
        sa.Column("annotator", sa.BigInteger(), nullable=True),
        sa.Column("standing", sa.Text(), nullable=False),
        sa.Column("ground_truth", sa.Boolean(), nullable=False),
        sa.Column("lead_seconds", sa.REAL(), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("model_version", sa.Text(), nullable=True),
        sa.Column("asset_id", sa.BigInteger(), nullable=True),
        sa.Column("unread", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint("standing IN ('chosen', 'other', 'superseded', 'skipped')", name="ls_annotation_standing"),
        sa.ForeignKeyConstraint(["ls_task_id"], ["ls_task.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("ls_task_id", "annotation_id", name="ls_annotation_once_a_task"),
    )
    op.create_index(
        "ls_annotation_chosen",
        "ls_annotation",
        ["ls_task_id"],
        unique=True,
        postgresql_where=sa.text("standing = 'chosen'"),
    )
    op.create_table(
        "ls_region",
        sa.Column("ls_annotation_id", sa.BigInteger(), nullable=False),
        sa.Column("i", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("mask_n", sa.Integer(), nullable=True),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("iou", sa.REAL(), nullable=True),
        sa.Column("counts", sa.Text(), nullable=True),
        sa.Column("bbox_x", sa.Integer(), nullable=True),
        sa.Column("bbox_y", sa.Integer(), nullable=True),
        sa.Column("bbox_w", sa.Integer(), nullable=True),
        sa.Column("bbox_h", sa.Integer(), nullable=True),
        sa.Column("area_px", sa.Integer(), nullable=True),
        sa.CheckConstraint("verdict IN ('kept', 'edited', 'deleted', 'added')", name="ls_region_verdict"),
        sa.ForeignKeyConstraint(["ls_annotation_id"], ["ls_annotation.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("ls_annotation_id", "i"),
    )


def downgrade() -> None:
    op.drop_table("ls_region")
    op.drop_table("ls_annotation")
    op.drop_table("ls_pull")
