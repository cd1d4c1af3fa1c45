"""A job's masks as people left them, read for exports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

from sqlalchemy import Connection, text

from db.results import LabeledAsset, StoredMask
from db.states import Verdict

_PAGE = 10  # the masks of this many assets are in memory at once; 3,000 masks of one asset take a few MB


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewedMask(StoredMask):
    """A mask that a person kept, corrected or drew. n counts again from 0. predicted_iou is NaN for a drawn mask."""

    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewedAsset(LabeledAsset):
    """An asset whose masks are what a person left of it."""


def annotated_assets(db: Connection, *, job_id: int) -> int:
    """How many assets of a job have an annotation that counts, in any project."""
    statement = text(f"SELECT count(*) FROM ({_CHOSEN}) AS chosen")
    return int(db.execute(statement, {"job_id": job_id, "ids": None}).scalar_one())


def annotations_read(db: Connection, *, job_id: int) -> str:
    """Which annotations of a job count, as one word: another one after `review` read a change."""
    statement = text(
        f"""SELECT count(*), coalesce(sum(hashtextextended(concat_ws(' ', chosen.id, n.annotation_id,
                                                                    extract(epoch FROM n.updated_at)), 0)), 0)
            FROM ({_CHOSEN}) AS chosen JOIN ls_annotation n ON n.id = chosen.annotation"""
    )
    number, digest = db.execute(statement, {"job_id": job_id, "ids": None}).one()
    return f"{number}-{int(digest) % 2**64:016x}"


def labels_left(db: Connection, *, job_id: int) -> list[str]:
    """The distinct labels of the masks that people left of a job, in alphabetical order."""
    statement = text(
        f"""SELECT DISTINCT r.label FROM ({_CHOSEN}) AS chosen
            JOIN ls_region r ON r.ls_annotation_id = chosen.annotation AND r.verdict <> 'deleted'"""
    )
    return sorted(db.execute(statement, {"job_id": job_id, "ids": None}).scalars())


def chosen_masks(db: Connection, *, job_id: int, asset_ids: Sequence[int]) -> dict[int, list[ReviewedMask]]:
    """The masks of the annotations of these assets, by asset id. The list is empty where all masks were deleted.

    An asset without an annotation is left out. Where several projects have one, an annotation marked as ground truth
    wins; otherwise the newest wins. A kept mask is exactly the stored mask.
    """
    rows = db.execute(
        text(
            f"""SELECT chosen.id AS my_id, r.i, r.verdict, r.label, coalesce(r.counts, m.counts) AS counts,
                       coalesce(r.bbox_x, m.bbox_x) AS bbox_x, coalesce(r.bbox_y, m.bbox_y) AS bbox_y,
                       coalesce(r.bbox_w, m.bbox_w) AS bbox_w, coalesce(r.bbox_h, m.bbox_h) AS bbox_h,
                       coalesce(r.area_px, m.area_px) AS area_px, coalesce(m.predicted_iou, 'NaN') AS predicted_iou,
                       CASE WHEN r.counts IS NULL THEN m.stability_score END AS stability_score, m.prompt
                FROM ({_CHOSEN}) AS chosen
                LEFT JOIN ls_region r ON r.ls_annotation_id = chosen.annotation AND r.verdict <> 'deleted'
                LEFT JOIN mask m ON m.asset_id = chosen.asset_id AND m.n = r.mask_n
                ORDER BY chosen.id, r.i"""
        ),
        {"job_id": job_id, "ids": list(asset_ids)},
    )
    return {
        asset_id: [
            ReviewedMask.from_row(row, asset_id=asset_id, n=n, verdict=Verdict(row.verdict))
            for n, row in enumerate(r for r in group if r.counts is not None)
        ]
        for asset_id, group in groupby(rows, key=attrgetter("my_id"))
    }


_CHOSEN = """SELECT DISTINCT ON (my.id) my.id, n.id AS annotation, n.asset_id
             FROM asset my JOIN job wanted ON wanted.id = my.job_id JOIN outcome mine ON mine.asset_id = my.id
             JOIN job same ON same.source = wanted.source AND same.model_version = wanted.model_version
             JOIN asset a ON a.job_id = same.id AND a.key = my.key
             JOIN outcome theirs ON theirs.asset_id = a.id  -- of the same bytes
                 AND coalesce(theirs.etag, a.etag) = coalesce(mine.etag, my.etag)
             JOIN ls_prediction p ON p.asset_id = a.id AND p.model_version = wanted.model_version AND p.state = 'done'
             JOIN ls_annotation n ON n.ls_task_id = p.ls_task_id AND n.standing = 'chosen'
             -- It may have begun from another version: of other bytes, or its masks may be deleted since.
             LEFT JOIN asset began ON began.id = n.asset_id LEFT JOIN outcome seen ON seen.asset_id = n.asset_id
             WHERE (n.asset_id IS NULL OR coalesce(seen.etag, began.etag) = coalesce(mine.etag, my.etag))
               AND my.job_id = :job_id AND (CAST(:ids AS bigint[]) IS NULL OR my.id = ANY(CAST(:ids AS bigint[])))
             ORDER BY my.id, n.ground_truth DESC, n.updated_at DESC, n.id"""


def _batches(assets: Iterable[LabeledAsset], size: int) -> Iterator[list[LabeledAsset]]:
    batch: list[LabeledAsset] = []
    for asset in assets:
        batch.append(asset)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def reviewed_assets(
    db: Connection, *, job_id: int, assets: Iterable[LabeledAsset], min_score: float | None = None
) -> Iterator[LabeledAsset]:
    """Stream those of the job's labeled assets that are annotated, with their masks as people left them.

    With min_score, assets without an annotation come too, with their predictions of at least that score.
    """
    for batch in _batches(assets, _PAGE):
        chosen = chosen_masks(db, job_id=job_id, asset_ids=[asset.asset_id for asset in batch])
        for asset in batch:
            if asset.asset_id in chosen:
                left = list[StoredMask](chosen[asset.asset_id])
                yield ReviewedAsset(asset_id=asset.asset_id, key=asset.key, size_hw=asset.size_hw, masks=left)
            elif min_score is not None:
                yield with_score(asset, min_score)


def with_score(asset: LabeledAsset, min_score: float) -> LabeledAsset:
    """The asset with its predictions of at least that score."""
    return replace(asset, masks=[mask for mask in asset.masks if mask.predicted_iou >= min_score])
