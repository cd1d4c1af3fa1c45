"""What people left of a job's masks in one Label Studio project, read for a tuning."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, text

from db.mask_prompt import unpack_prompt
from db.publishing import LsProject
from db.states import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectedMask:
    """A mask of a chosen annotation. counts: of the mask as the person left it; of a deleted one, as it was shown.

    bbox_xywh, prompt: of the mask as it was shown; None for an added one, and where the mask is no longer stored.
    """

    verdict: Verdict
    label: str
    counts: str | None
    bbox_xywh: tuple[int, int, int, int] | None
    prompt: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectedAsset:
    """An asset with the masks of its chosen annotation. etag: of the bytes that the job read."""

    asset_id: int
    key: str
    etag: str
    size_hw: tuple[int, int]
    masks: list[CorrectedMask]


def corrected_assets(db: Connection, *, job_id: int, ls_project: LsProject) -> list[CorrectedAsset]:
    """The assets of a job with a chosen annotation in this project, in key order.

    An earlier job over the same source may have published the same version. Then its tasks count too, where it read
    the same bytes.
    """
    rows = db.execute(
        text(
            """WITH chosen AS (
                   SELECT DISTINCT ON (my.id) my.id, my.key, n.id AS annotation, n.asset_id,
                          coalesce(mine.etag, my.etag) AS etag, mine.width, mine.height
                   FROM asset my JOIN job wanted ON wanted.id = my.job_id
                   JOIN outcome mine ON mine.asset_id = my.id AND mine.width IS NOT NULL
                   JOIN job same ON same.source = wanted.source AND same.model_version = wanted.model_version
                   JOIN asset a ON a.job_id = same.id AND a.key = my.key
                   JOIN outcome theirs ON theirs.asset_id = a.id
                       AND coalesce(theirs.etag, a.etag) = coalesce(mine.etag, my.etag)
                   JOIN ls_prediction p ON p.asset_id = a.id AND p.model_version = wanted.model_version
                       AND p.state = 'done'
                   JOIN ls_task t ON t.id = p.ls_task_id AND t.server = :server AND t.project_id = :project_id
                   JOIN ls_annotation n ON n.ls_task_id = t.id AND n.standing = 'chosen'
                   -- It may have begun from another version: of other bytes, or its masks may be deleted since.
                   LEFT JOIN asset began ON began.id = n.asset_id LEFT JOIN outcome seen ON seen.asset_id = n.asset_id
                   WHERE (n.asset_id IS NULL OR coalesce(seen.etag, began.etag) = coalesce(mine.etag, my.etag))
                     AND my.job_id = :job_id
                   ORDER BY my.id, n.ground_truth DESC, n.updated_at DESC, n.id)
               SELECT c.id AS asset_id, c.key, c.etag, c.width, c.height, r.verdict, r.label,
                      coalesce(r.counts, m.counts) AS counts, m.bbox_x, m.bbox_y, m.bbox_w, m.bbox_h, m.prompt
               FROM chosen c LEFT JOIN ls_region r ON r.ls_annotation_id = c.annotation
               LEFT JOIN mask m ON m.asset_id = c.asset_id AND m.n = r.mask_n
               ORDER BY c.key, r.i"""
        ),
        {"job_id": job_id, **ls_project.values()},
    )
    return [_asset(list(group)) for _, group in groupby(rows, key=attrgetter("asset_id"))]


def annotated_sources(db: Connection, *, ls_project: LsProject) -> list[tuple[str, int]]:
    """The jobs whose masks have annotations in a project: source and number, the newest first. At most ten."""
    rows = db.execute(
        text(
            """SELECT j.source, j.id FROM job j WHERE EXISTS (
                   SELECT 1 FROM ls_annotation n JOIN ls_task t ON t.id = n.ls_task_id
                   JOIN asset a ON a.id = n.asset_id
                   WHERE t.server = :server AND t.project_id = :project_id AND a.job_id = j.id)
               ORDER BY j.id DESC LIMIT 10"""
        ),
        ls_project.values(),
    )
    return [(row.source, row.id) for row in rows]


def _asset(rows: list[Any]) -> CorrectedAsset:
    first = rows[0]
    masks = [
        CorrectedMask(
            verdict=Verdict(row.verdict),
            label=row.label,
            counts=row.counts,
            bbox_xywh=None if row.bbox_x is None else (row.bbox_x, row.bbox_y, row.bbox_w, row.bbox_h),
            prompt=unpack_prompt(row.prompt),
        )
        for row in rows
        if row.verdict is not None
    ]
    return CorrectedAsset(
        asset_id=first.asset_id, key=first.key, etag=first.etag, size_hw=(first.height, first.width), masks=masks
    )
