"""What a job found: masks of assets, failed assets, labels. Only reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from typing import Any, Self

from sqlalchemy import Connection, text

from db import counters
from db.copying import copy_out
from db.mask_prompt import PROMPT_TEXT, unpack_prompt
from db.states import MaskCount


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMask:
    """A row of `mask`; bbox in whole pixels of the upright image."""

    asset_id: int
    n: int
    counts: str
    bbox_xywh: tuple[int, int, int, int]
    area_px: int
    predicted_iou: float
    stability_score: float | None
    label: str | None
    prompt: dict[str, Any] | None

    @classmethod
    def from_row(cls, row: Any, *, asset_id: int, n: int, **also: Any) -> Self:
        """Read the columns. They have the same names in every statement about masks. also: the fields of a subclass."""
        return cls(
            asset_id=asset_id,
            n=n,
            counts=row.counts,
            bbox_xywh=(row.bbox_x, row.bbox_y, row.bbox_w, row.bbox_h),
            area_px=row.area_px,
            predicted_iou=row.predicted_iou,
            stability_score=row.stability_score,
            label=row.label,
            prompt=unpack_prompt(row.prompt),
            **also,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledAsset:
    """A labeled asset with its masks in the model's order."""

    asset_id: int
    key: str
    size_hw: tuple[int, int]
    segment_ms: int | None = None  # None where an earlier job's masks were copied
    masks: list[StoredMask] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class BareAsset(LabeledAsset):
    """A labeled asset whose masks are read apart, with `masks_csv`. mask_count: how many are stored."""

    mask_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedAsset:
    asset_id: int
    key: str
    error_kind: str
    error: str


def require_job(db: Connection, *, job_id: int) -> None:
    """Call it after assets or masks were read. Raises LookupError when the job is deleted: some may have been gone."""
    statement = text("SELECT EXISTS (SELECT 1 FROM job WHERE id = :job_id AND deleted_at IS NULL)")
    if not db.execute(statement, {"job_id": job_id}).scalar_one():
        raise LookupError(f"job {job_id} was deleted while its masks were read: what was read is not complete")


def labeled_assets(db: Connection, *, job_id: int, after: str = "", page: int = 500) -> Iterator[LabeledAsset]:
    """Stream a job's labeled assets in key order with their masks, in bounded memory. after: only later keys.

    In a job with prompts, assets without a prompt are left out: their image was not read. The statement pages by key,
    so it holds no cursor and no long snapshot. An outcome that is recorded meanwhile may appear.
    """
    for rows in _labeled_rows(db, job_id=job_id, after=after, page=page):
        yield from _with_masks(db, job_id, rows)


def bare_assets(db: Connection, *, job_id: int, after: str = "", page: int = 2000) -> Iterator[BareAsset]:
    """The assets of `labeled_assets` without their masks. Raises LookupError when the job is deleted."""
    for rows in _labeled_rows(db, job_id=job_id, after=after, page=page):
        require_job(db, job_id=job_id)  # a page of a deleted job is short, and would seem to be the last one
        yield from map(_bare, rows)


def _labeled_rows(db: Connection, *, job_id: int, after: str, page: int) -> Iterator[Sequence[Any]]:
    while True:
        rows = db.execute(
            text(
                """SELECT a.id, a.key, o.width, o.height, o.mask_count FROM asset a JOIN outcome o ON o.asset_id = a.id
                   WHERE a.job_id = :job_id AND a.key > :after AND o.error_kind IS NULL AND o.width IS NOT NULL
                   ORDER BY a.key LIMIT :page"""
            ),
            {"job_id": job_id, "after": after, "page": page},
        ).all()
        yield rows
        if len(rows) < page:
            return
        after = rows[-1].key


def key_after(db: Connection, *, job_id: int, after: str, assets: int) -> str | None:
    """The key of the job's asset that is so many places behind a key. None when there are not so many."""
    statement = text(
        "SELECT key FROM asset WHERE job_id = :job_id AND key > :after ORDER BY key OFFSET :before LIMIT 1"
    )
    found: str | None = db.execute(
        statement, {"job_id": job_id, "after": after, "before": assets - 1}
    ).scalar_one_or_none()
    return found


def labeled_of_keys(db: Connection, *, job_id: int, keys: Sequence[str]) -> list[LabeledAsset]:
    """Those of a job's assets with these keys that are labeled, in key order with their masks."""
    return _with_masks(db, job_id, _rows_of_keys(db, job_id, keys))


def bare_of_keys(db: Connection, *, job_id: int, keys: Sequence[str]) -> list[BareAsset]:
    """The assets of `labeled_of_keys` without their masks. Raises LookupError when the job is deleted."""
    rows = _rows_of_keys(db, job_id, keys)
    require_job(db, job_id=job_id)
    return [_bare(row) for row in rows]


def _rows_of_keys(db: Connection, job_id: int, keys: Sequence[str]) -> Sequence[Any]:
    statement = text(
        """SELECT a.id, a.key, o.width, o.height, o.mask_count FROM asset a JOIN outcome o ON o.asset_id = a.id
           WHERE a.job_id = :job_id AND a.key = ANY(:keys) AND o.error_kind IS NULL AND o.width IS NOT NULL
           ORDER BY a.key"""
    )
    return db.execute(statement, {"job_id": job_id, "keys": list(keys)}).all()


def _bare(row: Any) -> BareAsset:
    asset_id, key, width, height, mask_count = row
    return BareAsset(asset_id=asset_id, key=key, size_hw=(height, width), mask_count=mask_count)


def _with_masks(db: Connection, job_id: int, rows: Sequence[Any]) -> list[LabeledAsset]:
    masks = masks_of(db, asset_ids=[row.id for row in rows])
    require_job(db, job_id=job_id)
    return [
        LabeledAsset(asset_id=row.id, key=row.key, size_hw=(row.height, row.width), masks=masks.get(row.id, []))
        for row in rows
    ]


def masks_per_asset(db: Connection, *, job_id: int) -> dict[int, int]:
    """How many labeled assets have each number of masks, in rising order of that number."""
    counted = counters.read_masks(db, job_id=job_id, kind=MaskCount.MASKS_AN_ASSET)
    if counted is not None:
        return dict(sorted((int(value), number) for value, number in counted.items()))
    statement = text(
        """SELECT mask_count, count(*) FROM outcome
           WHERE job_id = :job_id AND error_kind IS NULL AND width IS NOT NULL
           GROUP BY mask_count ORDER BY mask_count"""
    )
    return {row[0]: row[1] for row in db.execute(statement, {"job_id": job_id})}


def predicted_iou_percents(db: Connection, *, job_id: int) -> dict[int, int]:
    """How many masks have each predicted IoU in whole percent: rounded down, clamped to 0..99, in rising order."""
    counted = counters.read_masks(db, job_id=job_id, kind=MaskCount.IOU_PERCENT)
    if counted is not None:
        return dict(sorted((int(value), number) for value, number in counted.items() if value != "NaN"))
    statement = text(
        """SELECT greatest(0, least(99, floor(predicted_iou * 100)))::int AS percent, count(*)
           FROM mask JOIN outcome USING (asset_id)
           WHERE job_id = :job_id AND predicted_iou <> 'NaN' GROUP BY percent ORDER BY percent"""
    )
    return {row[0]: row[1] for row in db.execute(statement, {"job_id": job_id})}


def failed_assets(db: Connection, *, job_id: int, limit: int | None = None) -> list[FailedAsset]:
    """A job's failed assets in key order."""
    statement = text(
        """SELECT a.id AS asset_id, a.key, o.error_kind, coalesce(o.error, '') AS error
           FROM outcome o JOIN asset a ON a.id = o.asset_id
           WHERE o.job_id = :job_id AND o.error_kind IS NOT NULL ORDER BY a.key LIMIT :limit"""
    )
    return [FailedAsset(**row) for row in db.execute(statement, {"job_id": job_id, "limit": limit}).mappings()]


def stream_failed(db: Connection, *, job_id: int, page: int = 1000) -> Iterator[FailedAsset]:
    """Stream a job's failed assets by kind, then by time, in bounded memory."""
    statement = text(
        """SELECT a.id AS asset_id, a.key, o.error_kind, coalesce(o.error, '') AS error, o.created_at
           FROM outcome o JOIN asset a ON a.id = o.asset_id
           WHERE o.job_id = :job_id AND o.error_kind IS NOT NULL
             AND (o.error_kind, o.created_at, o.asset_id) > (:kind, :moment, :asset_id)
           ORDER BY o.error_kind, o.created_at, o.asset_id LIMIT :page"""
    )
    last: dict[str, Any] = {"kind": "", "moment": datetime(1970, 1, 1, tzinfo=UTC), "asset_id": 0}
    while rows := db.execute(statement, {"job_id": job_id, "page": page, **last}).all():
        for row in rows:
            yield FailedAsset(asset_id=row.asset_id, key=row.key, error_kind=row.error_kind, error=row.error)
        last = {"kind": row.error_kind, "moment": row.created_at, "asset_id": row.asset_id}


def failed_of_keys(db: Connection, *, job_id: int, keys: Sequence[str]) -> list[FailedAsset]:
    """Those of a job's assets with these keys that failed, in key order."""
    statement = text(
        """SELECT a.id AS asset_id, a.key, o.error_kind, coalesce(o.error, '') AS error
           FROM asset a JOIN outcome o ON o.asset_id = a.id
           WHERE a.job_id = :job_id AND a.key = ANY(:keys) AND o.error_kind IS NOT NULL ORDER BY a.key"""
    )
    rows = db.execute(statement, {"job_id": job_id, "keys": list(keys)}).mappings()
    return [FailedAsset(**row) for row in rows]


def labels_of(db: Connection, *, job_id: int) -> list[str]:
    """The distinct labels of a job's masks, in alphabetical order. Masks without a label are ignored."""
    counted = counters.read_masks(db, job_id=job_id, kind=MaskCount.LABEL)
    if counted is not None:
        return sorted(counted)
    statement = text(
        """SELECT DISTINCT label FROM mask JOIN outcome USING (asset_id)
           WHERE job_id = :job_id AND label IS NOT NULL"""
    )
    return sorted(db.execute(statement, {"job_id": job_id}).scalars())


def has_masks_without_label(db: Connection, *, job_id: int) -> bool:
    """Whether some of a job's masks have no label."""
    # One statement, so one snapshot: in two, masks that are stored in between would seem to have no label.
    counted = text(
        """WITH counted AS (
               SELECT coalesce(sum(number) FILTER (WHERE kind = 'iou_percent'), 0) AS masks,
                      coalesce(sum(number) FILTER (WHERE kind = 'label'), 0) AS labels
               FROM mask_counter WHERE job_id = :job_id AND kind IN ('iou_percent', 'label'))
           SELECT CASE WHEN masks = (SELECT coalesce(sum(masks), 0) FROM outcome_counter WHERE job_id = :job_id)
                  THEN masks > labels END FROM counted"""
    )
    found: bool | None = db.execute(counted, {"job_id": job_id}).scalar_one()
    if found is not None:
        return found
    statement = text(
        """SELECT EXISTS (SELECT 1 FROM mask JOIN outcome USING (asset_id)
                          WHERE job_id = :job_id AND label IS NULL)"""
    )
    return bool(db.execute(statement, {"job_id": job_id}).scalar_one())


def masks_of(db: Connection, *, asset_ids: Sequence[int]) -> dict[int, list[StoredMask]]:
    """The masks of these assets in the model's order. Assets without masks are left out."""
    rows = db.execute(
        text(
            """SELECT asset_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou, stability_score,
                      label, prompt FROM mask WHERE asset_id = ANY(:ids) ORDER BY asset_id, n"""
        ),
        {"ids": list(asset_ids)},
    ).all()  # at once: to fetch each row takes a fifth of an export
    masks = (  # unpacked: to name each column takes a tenth
        StoredMask(
            asset_id=asset_id,
            n=n,
            counts=counts,
            bbox_xywh=(x, y, width, height),
            area_px=area_px,
            predicted_iou=predicted_iou,
            stability_score=stability_score,
            label=label,
            prompt=unpack_prompt(prompt),
        )
        for asset_id, n, counts, x, y, width, height, area_px, predicted_iou, stability_score, label, prompt in rows
    )
    return {asset_id: list(group) for asset_id, group in groupby(masks, key=attrgetter("asset_id"))}


MASK_CSV_COLUMNS = (
    *("asset_id", "n", "counts", "bbox_x", "bbox_y", "bbox_w", "bbox_h", "area_px"),
    *("predicted_iou", "stability_score", "label", "prompt"),
)


def masks_csv(db: Connection, *, job_id: int, asset_ids: Sequence[int]) -> bytes:
    """The masks of these assets of a job as CSV without a header, in order of asset_id and n.

    A null is nothing, empty text is "". prompt is JSON. Raises LookupError when the job is deleted.
    """
    columns = ", ".join(PROMPT_TEXT if name == "prompt" else name for name in MASK_CSV_COLUMNS)
    ids = ",".join(map(str, asset_ids))
    wanted = f"SELECT {columns} FROM mask WHERE asset_id = ANY('{{{ids}}}'::bigint[]) ORDER BY asset_id, n"
    found = copy_out(db, f"COPY ({wanted}) TO STDOUT (FORMAT csv)")
    require_job(db, job_id=job_id)
    return found
