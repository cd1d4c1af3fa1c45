"""Counters of what a job found, so that a look at a job reads no outcomes: outcome_counter, worker_time, mask_counter.

A trigger keeps the first two, whoever writes outcomes, also a worker of an older version. From its first moment on they
count what is written; migration 0011 adds what was there before.

Each change of a table that workers use is a transaction of its own: two locks at once could meet a worker that takes
them in the other order. When it is interrupted, run it again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0007"
branch_labels = None
depends_on = None

_NUMBERS = ("assets", "masks", "reused", "without_size", "unused", "changed")
_OF_OUTCOMES = """count(*), sum(mask_count), count(answered_by), count(*) - count(width),
           count(error) FILTER (WHERE error_kind IS NULL), count(etag)"""
# Transactions that run at the same time have ids that follow each other. So they seldom wait for each other's row.
SLOT = "(pg_current_xact_id()::text::bigint % 32)::int"

_COUNT = f"""
CREATE OR REPLACE FUNCTION count_outcomes() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    sign int := CASE TG_OP WHEN 'INSERT' THEN 1 ELSE -1 END;
BEGIN
    -- Of a job that is being deleted in the same statement nothing is counted.
    INSERT INTO outcome_counter AS c (job_id, error_kind, slot, {", ".join(_NUMBERS)})
    SELECT job_id, kind, {SLOT}, sign * n1, sign * n2, sign * n3, sign * n4, sign * n5, sign * n6
    FROM (SELECT job_id, coalesce(error_kind, '') AS kind, {_OF_OUTCOMES} FROM written
          GROUP BY job_id, coalesce(error_kind, '')) AS s (job_id, kind, n1, n2, n3, n4, n5, n6)
    WHERE EXISTS (SELECT 1 FROM job WHERE id = s.job_id)
    ORDER BY job_id, kind
    ON CONFLICT (job_id, error_kind, slot) DO UPDATE
    SET {", ".join(f"{name} = c.{name} + excluded.{name}" for name in _NUMBERS)};
    IF TG_OP = 'INSERT' THEN
        INSERT INTO worker_time AS w (job_id, worker, first_at, last_at, first_ms, total_ms)
        SELECT job_id, worker, min(first), max(created_at),
               coalesce(sum(segment_ms) FILTER (WHERE created_at = first), 0), coalesce(sum(segment_ms), 0)
        FROM (SELECT *, min(created_at) OVER (PARTITION BY job_id, worker) AS first FROM written
              WHERE answered_by IS NULL AND worker IS NOT NULL) AS own
        GROUP BY job_id, worker ORDER BY job_id, worker
        ON CONFLICT (job_id, worker) DO UPDATE
        SET first_ms = CASE WHEN excluded.first_at < w.first_at THEN excluded.first_ms
                            WHEN excluded.first_at = w.first_at THEN w.first_ms + excluded.first_ms
                            ELSE w.first_ms END,
            first_at = least(w.first_at, excluded.first_at), last_at = greatest(w.last_at, excluded.last_at),
            total_ms = w.total_ms + excluded.total_ms;
    END IF;
    RETURN NULL;
END $$
"""


def upgrade() -> None:
    op.create_table(
        "outcome_counter",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("error_kind", sa.Text(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in _NUMBERS),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "error_kind", "slot"),
        postgresql_with={"fillfactor": "50"},
        if_not_exists=True,
    )
    op.create_table(
        "mask_counter",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), sa.Computed("md5(value)", persisted=True), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind IN ('label', 'class', 'iou_percent', 'masks_an_asset')", name="mask_counter_kind"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "kind", "digest", "slot"),
        postgresql_with={"fillfactor": "50"},
        if_not_exists=True,
    )
    op.create_table(
        "worker_time",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("first_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("first_ms", sa.BigInteger(), nullable=False),
        sa.Column("total_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "worker"),
        postgresql_with={"fillfactor": "50"},
        if_not_exists=True,
    )
    with op.get_context().autocommit_block():
        op.execute("ALTER TABLE job ADD COLUMN IF NOT EXISTS deleted_at timestamptz")
        op.execute(_COUNT)
        for operation, table in (("INSERT", "NEW"), ("DELETE", "OLD")):
            op.execute(
                f"""CREATE OR REPLACE TRIGGER outcome_counted_{operation.lower()} AFTER {operation} ON outcome
                    REFERENCING {table} TABLE AS written FOR EACH STATEMENT EXECUTE FUNCTION count_outcomes()"""
            )


def downgrade() -> None:
    op.execute("DROP TRIGGER outcome_counted_insert ON outcome")
    op.execute("DROP TRIGGER outcome_counted_delete ON outcome")
    op.execute("DROP FUNCTION count_outcomes()")
    op.drop_column("job", "deleted_at")
    for table in ("worker_time", "mask_counter", "outcome_counter"):
        op.drop_table(table)
