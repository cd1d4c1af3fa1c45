"""Which bytes the assets of a job with `--dedupe content` had, and how many were answered by others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_KINDS = "'label', 'class', 'iou_percent', 'masks_an_asset'"


def upgrade() -> None:
    op.create_table(
        "same_bytes",
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.Column("asset_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", "asset_id"),
    )
    op.create_index("same_bytes_of_asset", "same_bytes", ["asset_id"])
    _allow_kinds(f"{_KINDS}, 'same_bytes'")


def downgrade() -> None:
    op.execute("DELETE FROM mask_counter WHERE kind = 'same_bytes'")
    _allow_kinds(_KINDS)
    op.drop_table("same_bytes")


def _allow_kinds(kinds: str) -> None:
    # The table is small: rows of a few values a job.
    op.drop_constraint("mask_counter_kind", "mask_counter")
    op.create_check_constraint("mask_counter_kind", "mask_counter", f"kind IN ({kinds})")
