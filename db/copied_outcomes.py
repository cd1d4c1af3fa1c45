"""The one statement that gives assets the outcomes and masks of others, and what is remembered of bytes for it.

It has one snapshot. So an earlier job that is being deleted is seen with all masks of an outcome, or with none. The
masks are copied, so deleting either job takes nothing from the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

from db import counters
from db.states import MaskCount

MASK_COLUMNS = """asset_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou, stability_score, label,
                  prompt"""


def copy_outcomes(pairs: str, *, counted: MaskCount | None = None) -> str:
    """A statement for the assets of job :job_id. It returns the ids of those that got an outcome.

    pairs: a statement that gives id, etag (of the bytes that were read, if they were not those that were listed) and
    from_id, a labeled asset. counted: what the new outcomes count as, besides.
    """
    also = "" if counted is None else f"UNION ALL SELECT '{counted}', '' FROM answered"
    return f"""WITH pair AS ({pairs}),
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
               INSERT INTO mask_counter AS c (job_id, kind, value, slot, number)
               SELECT :job_id, kind, value, {counters.SLOT}, count(*)
               FROM (SELECT kind, value FROM copied CROSS JOIN LATERAL (VALUES
                         ('{MaskCount.LABEL}', label),
                         ('{MaskCount.CLASS}', coalesce(prompt->>'class', prompt->>'text')),
                         ('{MaskCount.IOU_PERCENT}', CASE WHEN predicted_iou = 'NaN' THEN 'NaN' ELSE
                              greatest(0, least(99, floor(predicted_iou * 100)))::int::text END)) AS v (kind, value)
                     UNION ALL
                     SELECT '{MaskCount.MASKS_AN_ASSET}', mask_count::text FROM answered WHERE width IS NOT NULL
                     {also}) AS n
               WHERE value IS NOT NULL GROUP BY kind, value ORDER BY kind, value
               {counters.ADDED})
           SELECT asset_id FROM answered"""


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
