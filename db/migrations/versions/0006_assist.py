"""Kept embeddings, the clicks that were answered from them, and the ids of regions that people added by a click."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "embedding",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("asset_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), server_default="wanted", nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("claimed_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("wanted_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("stored_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("used_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('wanted', 'stored', 'failed')", name="embedding_state"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("address", name="embedding_once"),
    )
    op.create_index("embedding_of_asset", "embedding", ["asset_id"])
    op.create_index("embedding_wanted", "embedding", ["id"], postgresql_where=sa.text("state = 'wanted'"))
    op.create_index("embedding_used", "embedding", ["used_at"], postgresql_where=sa.text("state = 'stored'"))
    op.create_table(
        "click",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("ls_task_id", sa.BigInteger(), nullable=False),
        sa.Column("clicked_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("answered_by", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column("milliseconds", sa.Integer(), nullable=False),
        sa.Column("prompt_id", sa.Text(), nullable=False),
        sa.Column("region_id", sa.Text(), nullable=True),
        sa.CheckConstraint("kind IN ('point', 'box', 'mixed', 'pick', 'refine')", name="click_kind"),
        sa.CheckConstraint("answered_by IN ('decoder', 'stored', 'nothing')", name="click_answered_by"),
        sa.ForeignKeyConstraint(["ls_task_id"], ["ls_task.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("click_of_task", "click", ["ls_task_id"])
    op.add_column("ls_region", sa.Column("region_id", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("ls_region", "region_id")
    op.drop_table("click")
    op.drop_table("embedding")
