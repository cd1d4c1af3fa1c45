"""The first tables: job, asset, prompt, chunk, suspect, outcome, mask.

A migration must not break the version of the code that runs before it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(sa.schema.CreateSequence(sa.Sequence("asset_id_seq")))
    op.create_table(
        "job",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="listing", nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("model_version", sa.Text(), nullable=False),
        sa.Column("asked", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("fresh", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("list_cursor", sa.Text(collation="C"), nullable=True),
        sa.Column("list_failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("asset_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("skipped", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("listed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('listing', 'running', 'done', 'cancelled', 'failed')", name="job_state"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("job_answers", "job", ["source", "model_version"], unique=False)
    op.create_table(
        "asset",
        sa.Column("id", sa.BigInteger(), server_default=sa.text("nextval('asset_id_seq')"), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id", "key", name="asset_once_a_job"),
    )
    op.create_table(
        "prompt",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.Column("prompts", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "key"),
    )
    op.create_table(
        "chunk",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("first_asset_id", sa.BigInteger(), nullable=False),
        sa.Column("last_asset_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), server_default="new", nullable=False),
        sa.Column("token", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ready_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("transient_failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("in_flight", postgresql.ARRAY(sa.BigInteger()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.CheckConstraint("state <> 'running' OR lease_until IS NOT NULL", name="chunk_running_has_lease"),
        sa.CheckConstraint("state IN ('new', 'sent', 'running', 'done')", name="chunk_state"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        postgresql_with={"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.01"},
    )
    op.create_index("chunk_new", "chunk", ["job_id", "id"], unique=False, postgresql_where=sa.text("state = 'new'"))
    op.create_index("chunk_open", "chunk", ["job_id"], unique=False, postgresql_where=sa.text("state <> 'done'"))
    op.create_index("chunk_running", "chunk", ["id"], unique=False, postgresql_where=sa.text("state = 'running'"))
    op.create_index("chunk_sent", "chunk", ["sent_at"], unique=False, postgresql_where=sa.text("state = 'sent'"))
    op.create_table(
        "outcome",
        sa.Column("asset_id", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("error_kind", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("mask_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("segment_ms", sa.Integer(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("answered_by", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["asset_id"], ["asset.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("asset_id"),
    )
    op.create_index(
        "outcome_of_job", "outcome", ["job_id", "error_kind"], unique=False, postgresql_include=["mask_count"]
    )
    op.create_table(
        "suspect",
        sa.Column("asset_id", sa.BigInteger(), nullable=False),
        sa.Column("deaths_alone", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.ForeignKeyConstraint(["asset_id"], ["asset.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("asset_id"),
    )
    op.create_table(
        "mask",
        sa.Column("asset_id", sa.BigInteger(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("counts", sa.Text(), nullable=False),
        sa.Column("bbox_x", sa.Integer(), nullable=False),
        sa.Column("bbox_y", sa.Integer(), nullable=False),
        sa.Column("bbox_w", sa.Integer(), nullable=False),
        sa.Column("bbox_h", sa.Integer(), nullable=False),
        sa.Column("area_px", sa.Integer(), nullable=False),
        sa.Column("predicted_iou", sa.REAL(), nullable=False),
        sa.Column("stability_score", sa.REAL(), nullable=True),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column("prompt", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.ForeignKeyConstraint(["asset_id"], ["outcome.asset_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("asset_id", "n"),
    )


def downgrade() -> None:
    op.drop_table("mask")
    op.drop_table("suspect")
    op.drop_table("outcome")
    op.drop_table("chunk")
    op.drop_table("prompt")
    op.drop_table("asset")
    op.drop_table("job")
    op.execute(sa.schema.DropSequence(sa.Sequence("asset_id_seq")))
