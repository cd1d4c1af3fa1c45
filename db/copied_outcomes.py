"""The one statement that gives assets the outcomes and masks of others, and what is remembered of bytes for it.

It has one snapshot. So an earlier job that is being deleted is seen with all masks of an outcome, or with none. The
masks are copied, so deleting either job takes nothing from the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, text

from db import counters
from db.states import MaskCount

MASK_COLUMNS = """asset_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou, stability_score, label,
                  prompt"""


def copy_outcomes(
    db: Connection, pairs: str, values: Mapping[str, Any], *, counted: MaskCount | None = None
) -> set[int]:
    """Give assets of the job `job_id`, which is one of `values`, outcomes of others. Returns which got one.

    pairs: a statement that gives id, etag (of the bytes that were read, if they were not those that were listed) and
    from_id, a labeled asset. counted: what the new outcomes count as, besides.
    """
    also = "" if counted is None else f"UNION ALL SELECT '{counted}', '' FROM answered"
    statement = f"""WITH pair AS ({pairs}),
           answered AS (
               INSERT INTO outcome (asset_id, job_id, error, width, height, mask_count, worker, answered_by, etag)
               SELECT pair.id, :job_id, o.error, o.width, o.height, o.mask_count, o.worker, o.asset_id, pair.etag
               FROM pair JOIN outcome o ON o.asset_id = pair.from_id AND o.error_kind IS NULL
               ORDER BY pair.id
               ON CONFLICT (asset_id) DO NOTHING
               RETURNING asset_id, answered_by, width, mask_count),
           copied AS (
               INSERT INTO mask ({MASK_COLUMNS})
               SELECT answered.asset_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou,
                      stability_score, label, prompt
               -- OFFSET 0: the masks are found by key, whatever the planner believes about their number.
               FROM answered CROSS JOIN LATERAL (SELECT * FROM mask WHERE asset_id = answered_by OFFSET 0) AS earlier
               RETURNING predicted_iou, label, prompt),
           counted AS (
               SELECT kind, value, count(*) AS number
               FROM (SELECT kind, value FROM copied CROSS JOIN LATERAL (VALUES
                         ('{MaskCount.LABEL}', label),
                         ('{MaskCount.CLASS}', coalesce(prompt->>'class', prompt->>'text')),
                         ('{MaskCount.IOU_PERCENT}', CASE WHEN predicted_iou = 'NaN' THEN 'NaN' ELSE
                              greatest(0, least(99, floor(predicted_iou * 100)))::int::text END)) AS v (kind, value)
                     UNION ALL
                     SELECT '{MaskCount.MASKS_AN_ASSET}', mask_count::text FROM answered WHERE width IS NOT NULL
                     {also}) AS n
               WHERE value IS NOT NULL GROUP BY kind, value)
           SELECT asset_id, NULL AS kind, NULL AS value, 0 AS number FROM answered
           UNION ALL SELECT NULL, kind, value, number FROM counted"""
    rows = db.execute(text(statement), dict(values)).all()
    # Not in the same statement: outcomes are counted by a trigger at its end, and `leases.record` counts them before
    # masks. Two that count in different orders would wait for each other.
    numbers = {(MaskCount(row.kind), row.value): row.number for row in rows if row.asset_id is None}
    if numbers:
        counters.add_masks(db, job_id=values["job_id"], numbers=numbers)
    return {row.asset_id for row in rows if row.asset_id is not None}


def remember_bytes(db: Connection, *, keys: Sequence[tuple[str, int]]) -> None:
    """Store which bytes labeled assets had: keys of `db.same_bytes`, each with an asset."""
    if keys:
        db.execute(
            text(
                """INSERT INTO same_bytes (key, asset_id)
                   SELECT * FROM unnest(CAST(:keys AS text[]), CAST(:assets AS bigint[])) ON CONFLICT DO NOTHING"""
            ),
            {"keys": [key for key, _ in keys], "assets": [asset_id for _, asset_id in keys]},
        )
