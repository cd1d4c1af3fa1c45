"""Masks in partitions by ranges of asset ids. The table as it was becomes the first partition; no row is moved."""

from __future__ import annotations

import re

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

PARTITION_ASSETS = 2**20
AHEAD = 2  # a lister of an older version makes none

_COLUMNS = "asset_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou, stability_score, label, prompt"


def upgrade() -> None:
    bound = _bound()
    op.execute("ALTER TABLE mask RENAME TO mask_part_0")
    op.execute("ALTER INDEX mask_pkey RENAME TO mask_part_0_pkey")
    op.execute("CREATE TABLE mask (LIKE mask_part_0 INCLUDING DEFAULTS) PARTITION BY RANGE (asset_id)")
    op.execute("ALTER TABLE mask ADD CONSTRAINT mask_pkey PRIMARY KEY (asset_id, n)")
    # The constraint proves that each row belongs there. So no row is read.
    op.execute(f"ALTER TABLE mask ATTACH PARTITION mask_part_0 FOR VALUES FROM (MINVALUE) TO ({bound})")
    op.execute("ALTER TABLE mask_part_0 DROP CONSTRAINT mask_part_bound")
    for first in range(bound, bound + AHEAD * PARTITION_ASSETS, PARTITION_ASSETS):
        op.execute(
            f"""CREATE TABLE mask_part_{first} PARTITION OF mask
                FOR VALUES FROM ({first}) TO ({first + PARTITION_ASSETS})"""
        )


def _bound() -> int:
    definition = (
        op.get_bind()
        .execute(sa.text("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'mask_part_bound'"))
        .scalar_one()
    )
    return int(re.sub(r"\D", "", definition))


def downgrade() -> None:
    op.execute("CREATE TABLE mask_whole (LIKE mask INCLUDING DEFAULTS)")
    op.execute(f"INSERT INTO mask_whole ({_COLUMNS}) SELECT {_COLUMNS} FROM mask")
    op.execute("DROP TABLE mask")
    op.execute("ALTER TABLE mask_whole RENAME TO mask")
    op.execute("ALTER TABLE mask ADD CONSTRAINT mask_pkey PRIMARY KEY (asset_id, n)")
