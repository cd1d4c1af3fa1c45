"""A few assets of a job, found without reading it: spread over its listing or at random, by label, of each error kind.

Only reads.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from sqlalchemy import Connection, text

from db import results
from db.results import FailedAsset, LabeledAsset

_PAGE = 10  # the masks of this many assets are in memory at once
_SPAN = "outcome WHERE job_id = :job_id AND error_kind IS NULL AND width IS NOT NULL"


def sample_ids(db: Connection, *, job_id: int, limit: int, at_random: bool = False) -> list[int]:
    """At most `limit` of a job's labeled assets, evenly spread over the listing or at random, in listing order.

    All of them when there are no more. In a job with prompts, assets that nobody looked at are left out.
    """
    values = {"job_id": job_id, "limit": limit}
    first = text(f"SELECT asset_id FROM {_SPAN} ORDER BY asset_id LIMIT :limit + 1")
    found = list(db.execute(first, values).scalars())
    if len(found) <= limit:
        return found
    # At each place, a fraction of the range of ids, the next labeled asset.
    places = [random.random() for _ in range(2 * limit)] if at_random else [n / limit for n in range(limit)]
    spread = text(
        f"""WITH span AS (
                SELECT (SELECT min(asset_id) FROM {_SPAN}) AS first, (SELECT max(asset_id) FROM {_SPAN}) AS last)
            SELECT DISTINCT o.asset_id FROM span CROSS JOIN unnest(CAST(:places AS float8[])) AS place
            CROSS JOIN LATERAL (
                SELECT asset_id FROM {_SPAN} AND asset_id >= first + floor(place * (last - first + 1))::bigint
                ORDER BY asset_id LIMIT 1) o ORDER BY o.asset_id"""
    )
    found = list(db.execute(spread, {"job_id": job_id, "places": places}).scalars())
    return sorted(random.sample(found, min(limit, len(found)))) if at_random else found


def mean_ious(db: Connection, *, asset_ids: Sequence[int], label: str | None = None) -> dict[int, float]:
    """The mean predicted IoU of each asset's masks, of those with this label alone if one is given.

    A mask without a label is an "object". Assets without such a mask are left out.
    """
    statement = text(
        """SELECT asset_id, avg(predicted_iou) FILTER (WHERE predicted_iou <> 'NaN') FROM mask
           WHERE asset_id = ANY(:ids) AND (CAST(:label AS text) IS NULL OR coalesce(label, 'object') = :label)
           GROUP BY asset_id"""
    )
    rows = db.execute(statement, {"ids": list(asset_ids), "label": label})
    return {row[0]: float(row[1] or 0) for row in rows}


def labeled_of_ids(db: Connection, *, job_id: int, asset_ids: Sequence[int]) -> Iterator[LabeledAsset]:
    """Stream these labeled assets of a job with their masks, in the order of asset_ids."""
    statement = text(
        """SELECT a.id, a.key, o.width, o.height, o.segment_ms FROM asset a JOIN outcome o ON o.asset_id = a.id
           WHERE a.id = ANY(:ids) AND a.job_id = :job_id AND o.error_kind IS NULL AND o.width IS NOT NULL"""
    )
    for start in range(0, len(asset_ids), _PAGE):
        page = list(asset_ids[start : start + _PAGE])
        rows = {row.id: row for row in db.execute(statement, {"ids": page, "job_id": job_id})}
        masks = results.masks_of(db, asset_ids=page)
        results.require_job(db, job_id=job_id)
        for row in (rows[asset_id] for asset_id in page if asset_id in rows):
            yield LabeledAsset(
                asset_id=row.id,
                key=row.key,
                size_hw=(row.height, row.width),
                segment_ms=row.segment_ms,
                masks=masks.get(row.id, []),
            )


def photo_of(db: Connection, *, job_id: int, asset_id: int) -> tuple[str, str | None] | None:
    """The key and the error kind (None when labeled) of an asset of this job that has an outcome. None for another."""
    statement = text(
        """SELECT a.key, o.error_kind FROM asset a JOIN outcome o ON o.asset_id = a.id
           WHERE a.id = :asset_id AND a.job_id = :job_id"""
    )
    row = db.execute(statement, {"asset_id": asset_id, "job_id": job_id}).one_or_none()
    return None if row is None else (row.key, row.error_kind)


def failed_of_each_kind(db: Connection, *, job_id: int, each: int) -> list[FailedAsset]:
    """The newest failed assets of each kind, at most `each`, by kind."""
    statement = text(
        """SELECT o.asset_id, a.key, o.error_kind, coalesce(o.error, '') AS error
           FROM (SELECT DISTINCT error_kind FROM outcome_counter WHERE job_id = :job_id AND error_kind <> '') kind
           CROSS JOIN LATERAL (
               SELECT asset_id, error_kind, error, created_at FROM outcome
               WHERE job_id = :job_id AND error_kind = kind.error_kind
               ORDER BY created_at DESC, asset_id DESC LIMIT :each) o
           JOIN asset a ON a.id = o.asset_id ORDER BY o.error_kind, o.created_at DESC, o.asset_id DESC"""
    )
    rows = db.execute(statement, {"job_id": job_id, "each": each}).mappings()
    return [FailedAsset(**row) for row in rows]
