"""SQL of the counters of masks: kept up to date where masks are written, and read in the time of a few rows."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, text

from db.states import MaskCount

# As in the trigger: transactions that run at the same time have ids that follow each other, and so different slots.
_SLOT = "(pg_current_xact_id()::text::bigint % 32)::int"


def add_masks(db: Connection, *, job_id: int, numbers: Mapping[tuple[MaskCount, str], int]) -> None:
    """Count masks. Call it in the transaction that writes them, after their outcomes."""
    in_order = sorted(numbers.items())
    db.execute(
        text(
            f"""INSERT INTO mask_counter AS c (job_id, kind, value, slot, number)
                SELECT :job_id, kind, value, {_SLOT}, number
                FROM unnest(CAST(:kinds AS text[]), CAST(:values AS text[]), CAST(:numbers AS bigint[]))
                     AS n (kind, value, number)
                ON CONFLICT (job_id, kind, digest, slot) DO UPDATE SET number = c.number + excluded.number"""
        ),
        {
            "job_id": job_id,
            "kinds": [kind for (kind, _), _ in in_order],
            "values": [value for (_, value), _ in in_order],
            "numbers": [number for _, number in in_order],
        },
    )


def read_masks(db: Connection, *, job_id: int, kind: MaskCount) -> dict[str, int] | None:
    """How many there are of each value, without an order. None: not all masks are counted.

    That is a job from before there were counters, or one at which a worker of an older version was at work.
    """
    is_complete = db.execute(
        text(
            """WITH counted AS (
                   SELECT coalesce(sum(number) FILTER (WHERE kind = 'iou_percent'), 0) AS masks,
                          coalesce(sum(number) FILTER (WHERE kind = 'masks_an_asset'), 0) AS assets
                   FROM mask_counter WHERE job_id = :job_id AND kind IN ('iou_percent', 'masks_an_asset')),
               written AS (
                   SELECT coalesce(sum(masks), 0) AS masks,
                          coalesce(sum(assets - without_size) FILTER (WHERE error_kind = ''), 0) AS assets
                   FROM outcome_counter WHERE job_id = :job_id)
               SELECT counted = written FROM counted, written"""
        ),
        {"job_id": job_id},
    ).scalar_one()
    if not is_complete:
        return None
    statement = text(
        """SELECT value, sum(number)::bigint FROM mask_counter WHERE job_id = :job_id AND kind = :kind
           GROUP BY value"""
    )
    return {row[0]: row[1] for row in db.execute(statement, {"job_id": job_id, "kind": kind})}
