"""For filled tables, while workers run: what the counters lack, indexes, and masks without a foreign key.

Nothing here keeps a worker waiting: indexes are built concurrently, and the counts are read from one snapshot. When it
is interrupted, run it again: each step can be repeated.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

PARTITION_ASSETS = 2**20

_INDEXES = {
    "chunk_unfinished": "chunk (job_id, first_asset_id) WHERE state <> 'done'",
    "chunk_assets": "chunk (job_id, first_asset_id)",
    "chunk_recent": "chunk (job_id, sent_at) WHERE state IN ('running', 'done')",
    "outcome_labeled": "outcome (job_id, asset_id) WHERE error_kind IS NULL AND width IS NOT NULL",
    "outcome_failed": "outcome (job_id, error_kind, created_at, asset_id) WHERE error_kind IS NOT NULL",
    "outcome_unused": "outcome (job_id, asset_id) WHERE error_kind IS NULL AND error IS NOT NULL",
    "ls_prediction_open": "ls_prediction (state, model_version, ls_task_id) WHERE state <> 'done'",
}

# What was written since the trigger exists is in the counters of the same snapshot: the difference is what was before.
_COUNT_EARLIER = """
INSERT INTO outcome_counter (job_id, error_kind, slot, assets, masks, reused, without_size, unused, changed)
SELECT job_id, kind, -1, coalesce(n1, 0) - coalesce(c1, 0), coalesce(n2, 0) - coalesce(c2, 0),
       coalesce(n3, 0) - coalesce(c3, 0), coalesce(n4, 0) - coalesce(c4, 0), coalesce(n5, 0) - coalesce(c5, 0),
       coalesce(n6, 0) - coalesce(c6, 0)
FROM (SELECT job_id, coalesce(error_kind, ''), count(*), sum(mask_count), count(answered_by), count(*) - count(width),
             count(error) FILTER (WHERE error_kind IS NULL), count(etag)
      FROM outcome GROUP BY job_id, coalesce(error_kind, '')) AS there (job_id, kind, n1, n2, n3, n4, n5, n6)
FULL JOIN (SELECT job_id, error_kind, sum(assets), sum(masks), sum(reused), sum(without_size), sum(unused), sum(changed)
           FROM outcome_counter WHERE slot >= 0 GROUP BY job_id, error_kind)
          AS counted (job_id, kind, c1, c2, c3, c4, c5, c6) USING (job_id, kind)
WHERE EXISTS (SELECT 1 FROM job WHERE id = job_id)
"""

# Of a job that is at work meanwhile, the time counts from the upgrade on.
_TIME_EARLIER = """
INSERT INTO worker_time AS w (job_id, worker, first_at, last_at, first_ms, total_ms)
SELECT job_id, worker, min(first), max(created_at), coalesce(sum(segment_ms) FILTER (WHERE created_at = first), 0),
       coalesce(sum(segment_ms), 0)
FROM (SELECT job_id, worker, created_at, segment_ms, min(created_at) OVER (PARTITION BY job_id, worker) AS first
      FROM outcome WHERE answered_by IS NULL AND worker IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM worker_time t WHERE t.job_id = outcome.job_id)) AS own
GROUP BY job_id, worker
ON CONFLICT (job_id, worker) DO UPDATE
SET first_ms = excluded.first_ms, first_at = excluded.first_at, total_ms = w.total_ms + excluded.total_ms
"""


def upgrade() -> None:
    # In the order in which workers lock them. Two that lock them in different orders would wait for each other.
    op.execute("LOCK TABLE outcome IN ACCESS EXCLUSIVE MODE")
    op.execute("ALTER TABLE mask DROP CONSTRAINT IF EXISTS mask_asset_id_fkey")
    op.execute("ALTER TABLE mask DROP CONSTRAINT IF EXISTS mask_part_bound")
    op.execute(f"ALTER TABLE mask ADD CONSTRAINT mask_part_bound CHECK (asset_id < {_bound()}) NOT VALID")
    with op.get_context().autocommit_block():
        for name, what in _INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")  # an interrupted build leaves an invalid one
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {what}")
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS chunk_open")
        op.execute("ALTER TABLE mask VALIDATE CONSTRAINT mask_part_bound")
        op.execute("DELETE FROM outcome_counter WHERE slot = -1")
    op.execute(_COUNT_EARLIER)
    op.execute(_TIME_EARLIER)


def _bound() -> int:
    """The first asset id of the second partition. There is room for what is listed during the upgrade."""
    used, is_filled = (
        op.get_bind().execute(sa.text("SELECT last_value, EXISTS (SELECT 1 FROM mask) FROM asset_id_seq")).one()
    )
    return int((used // PARTITION_ASSETS + (8 if is_filled else 1)) * PARTITION_ASSETS)


def downgrade() -> None:
    op.execute("DELETE FROM mask WHERE NOT EXISTS (SELECT 1 FROM outcome WHERE asset_id = mask.asset_id)")
    op.execute("ALTER TABLE mask DROP CONSTRAINT IF EXISTS mask_part_bound")
    op.create_foreign_key("mask_asset_id_fkey", "mask", "outcome", ["asset_id"], ["asset_id"], ondelete="CASCADE")
    op.create_index("chunk_open", "chunk", ["job_id"], postgresql_where=sa.text("state <> 'done'"))
    for name in _INDEXES:
        op.execute(f"DROP INDEX {name}")
    op.execute("DELETE FROM outcome_counter")
    op.execute("DELETE FROM worker_time")
