"""A counter of predictions, so that `show` reads none; and which outcomes count as changed.

A trigger keeps the counter, whoever writes predictions, also a publisher of an older version. What was there before is
counted in one snapshot with what the trigger has counted since. When it is interrupted, run it again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_NUMBERS = ("predictions", "masks_shown", "masks_left_out", "iou_sum")
_KEY = "job_id, server, project_id, state"


def _counted(table: str, sign: int) -> str:
    return f"""
    INSERT INTO prediction_counter AS c ({_KEY}, slot, {", ".join(_NUMBERS)})
    SELECT {_KEY}, 0, {sign} * count(*), {sign} * sum(mask_count - left_out), {sign} * sum(left_out),
           {sign} * sum(iou_sum::float)
    FROM {table} JOIN ls_task t ON t.id = ls_task_id
    WHERE EXISTS (SELECT 1 FROM job WHERE id = job_id)  -- predictions stay when their job is deleted
    GROUP BY {_KEY} ORDER BY {_KEY}
    ON CONFLICT ({_KEY}, slot) DO UPDATE
    SET {", ".join(f"{name} = c.{name} + excluded.{name}" for name in _NUMBERS)};"""


_COUNT = f"""
CREATE OR REPLACE FUNCTION count_predictions() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN {_counted("removed", -1)}
    END IF;
    IF TG_OP <> 'DELETE' THEN {_counted("added", 1)}
    END IF;
    RETURN NULL;
END $$
"""

# The trigger needs the task of each prediction. A foreign key would delete the task first.
_DELETE_FIRST = """
CREATE OR REPLACE FUNCTION delete_predictions_of_task() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM ls_prediction WHERE ls_task_id = OLD.id;
    RETURN OLD;
END $$
"""

_TRIGGERS = {
    "INSERT": "NEW TABLE AS added",
    "UPDATE": "OLD TABLE AS removed NEW TABLE AS added",
    "DELETE": "OLD TABLE AS removed",
}

_COUNT_EARLIER = f"""
INSERT INTO prediction_counter ({_KEY}, slot, {", ".join(_NUMBERS)})
SELECT {_KEY}, -1, coalesce(n1, 0) - coalesce(c1, 0), coalesce(n2, 0) - coalesce(c2, 0),
       coalesce(n3, 0) - coalesce(c3, 0), coalesce(n4, 0) - coalesce(c4, 0)
FROM (SELECT {_KEY}, count(*), sum(mask_count - left_out), sum(left_out), sum(iou_sum::float)
      FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id
      WHERE EXISTS (SELECT 1 FROM job WHERE id = p.job_id) GROUP BY {_KEY}) AS there ({_KEY}, n1, n2, n3, n4)
FULL JOIN (SELECT {_KEY}, {", ".join(_NUMBERS)} FROM prediction_counter WHERE slot = 0)
          AS counted ({_KEY}, c1, c2, c3, c4) USING ({_KEY})
"""

_OUTCOME_NUMBERS = ("assets", "masks", "reused", "without_size", "unused", "changed")
_SLOT = "(pg_current_xact_id()::text::bigint % 32)::int"
# An asset that a list of keys named without an etag did not change: its etag was not known.
_CHANGED = "etag IS NOT NULL AND EXISTS (SELECT 1 FROM asset WHERE id = written.asset_id AND etag <> '')"


def _count_outcomes(changed: str) -> str:
    return f"""
CREATE OR REPLACE FUNCTION count_outcomes() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    sign int := CASE TG_OP WHEN 'INSERT' THEN 1 ELSE -1 END;
BEGIN
    -- Of a job that is being deleted in the same statement nothing is counted.
    INSERT INTO outcome_counter AS c (job_id, error_kind, slot, {", ".join(_OUTCOME_NUMBERS)})
    SELECT job_id, kind, {_SLOT}, sign * n1, sign * n2, sign * n3, sign * n4, sign * n5, sign * n6
    FROM (SELECT job_id, coalesce(error_kind, '') AS kind, count(*), sum(mask_count), count(answered_by),
                 count(*) - count(width), count(error) FILTER (WHERE error_kind IS NULL),
                 count(*) FILTER (WHERE is_changed)
          FROM (SELECT *, {changed} AS is_changed FROM written) AS w
          GROUP BY job_id, coalesce(error_kind, '')) AS s (job_id, kind, n1, n2, n3, n4, n5, n6)
    WHERE EXISTS (SELECT 1 FROM job WHERE id = s.job_id)
    ORDER BY job_id, kind
    ON CONFLICT (job_id, error_kind, slot) DO UPDATE
    SET {", ".join(f"{name} = c.{name} + excluded.{name}" for name in _OUTCOME_NUMBERS)};
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
        "prediction_counter",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("server", sa.Text(), nullable=False),
        sa.Column("project_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in _NUMBERS[:-1]),
        sa.Column("iou_sum", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "server", "project_id", "state", "slot"),
        postgresql_with={"fillfactor": "50"},
        if_not_exists=True,
    )
    with op.get_context().autocommit_block():
        op.execute(_count_outcomes(_CHANGED))
        op.execute(_COUNT)
        op.execute(_DELETE_FIRST)
        for operation, tables in _TRIGGERS.items():
            op.execute(
                f"""CREATE OR REPLACE TRIGGER prediction_counted_{operation.lower()} AFTER {operation} ON ls_prediction
                    REFERENCING {tables} FOR EACH STATEMENT EXECUTE FUNCTION count_predictions()"""
            )
        op.execute(
            """CREATE OR REPLACE TRIGGER predictions_first BEFORE DELETE ON ls_task
               FOR EACH ROW EXECUTE FUNCTION delete_predictions_of_task()"""
        )
        op.execute(
            "DROP INDEX CONCURRENTLY IF EXISTS ls_prediction_worst"
        )  # an interrupted build leaves an invalid one
        op.execute(
            """CREATE INDEX CONCURRENTLY ls_prediction_worst ON ls_prediction (job_id, iou_min)
               WHERE state = 'done' AND iou_min IS NOT NULL"""
        )
        op.execute("DELETE FROM prediction_counter WHERE slot = -1")
    op.execute(_COUNT_EARLIER)


def downgrade() -> None:
    op.execute("DROP INDEX ls_prediction_worst")
    op.execute("DROP TRIGGER predictions_first ON ls_task")
    for operation in _TRIGGERS:
        op.execute(f"DROP TRIGGER prediction_counted_{operation.lower()} ON ls_prediction")
    op.execute("DROP FUNCTION count_predictions()")
    op.execute("DROP FUNCTION delete_predictions_of_task()")
    op.execute(_count_outcomes("etag IS NOT NULL"))
    op.drop_table("prediction_counter")
