"""SQL of what people made of the predictions: annotations as last read from Label Studio, counted and exported.

An asset of a job meets its task through the job's model version: where an earlier job over the same source published
the same version, the task and the masks are that job's, and the counts are the same for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, text

from db import jobs as queries
from db.jobs import LabeledAsset, StoredMask
from db.publishing import Place
from db.tables import Standing, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownTask:
    """A task of ours as the outbox knows it. asset_ids: whose masks the prediction of each model version shows."""

    ls_task_id: int
    task_id: int | None
    size_hw: tuple[int, int]
    asset_ids: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionRow:
    """One mask of a chosen annotation. iou: of an edited one, with what was shown. counts, bbox, area: of what a person
    drew, None where the stored mask stands."""

    verdict: Verdict
    mask_n: int | None
    label: str
    iou: float | None = None
    counts: str | None = None
    bbox_xywh: tuple[int, int, int, int] | None = None
    area_px: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotationRow:
    """One annotation as read, with its regions where it is the chosen one of its task."""

    annotation_id: int
    annotator: int | None
    standing: Standing
    ground_truth: bool
    lead_seconds: float | None
    updated_at: datetime
    model_version: str | None
    asset_id: int | None
    unread: int = 0
    regions: Sequence[RegionRow] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many masks of one model version, label and score band met one verdict.

    band: the score's twentieth, 0..19, None for added masks. relabelled: edited ones with another label. measured,
    iou_sum: of the edited ones whose correction could be read.
    """

    model_version: str | None
    label: str
    band: int | None
    verdict: Verdict
    masks: int
    relabelled: int
    measured: int
    iou_sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AssetCounts:
    """What became of the assets that a project has of a job.

    published = untouched + corrected + elsewhere + skipped + waiting. elsewhere: annotated, but not from the job's own
    prediction; skipped: passed over by everyone who opened it.
    """

    published: int
    untouched: int
    corrected: int
    elsewhere: int
    skipped: int
    waiting: int
    several_annotators: int
    unread_regions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """What one person did. seconds_*: of a submitted annotation, as Label Studio's page measured it."""

    annotator: int | None
    submitted: int
    skipped: int
    seconds_total: float
    seconds_median: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviewed:
    """The chosen annotation of an asset. agreement 0..1: of kept masks 1, of edited ones their IoU, of others 0."""

    asset_id: int
    key: str
    size_hw: tuple[int, int]
    task_id: int | None
    agreement: float
    kept: int
    edited: int
    deleted: int
    added: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewedMask(StoredMask):
    """A mask that a person kept, corrected or drew, numbered anew in its asset. predicted_iou is NaN where drawn."""

    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewedAsset(LabeledAsset):
    """An asset whose masks are what a person left of it."""


# ------------------------------------------------------------------------------------------------ what is read


def watermark(db: Connection, *, place: Place) -> datetime | None:
    """Up to when the project's annotations have been read, on its server's clock; None before the first time."""
    statement = text("SELECT watermark FROM ls_pull WHERE server = :server AND project_id = :project_id")
    return db.execute(statement, place.values()).scalar_one_or_none()


def set_watermark(db: Connection, *, place: Place, watermark: datetime) -> None:
    """Remember up to when the project's annotations have been read."""
    db.execute(
        text(
            """INSERT INTO ls_pull (server, project_id, watermark) VALUES (:server, :project_id, :watermark)
               ON CONFLICT (server, project_id) DO UPDATE SET watermark = excluded.watermark, pulled_at = now()"""
        ),
        {**place.values(), "watermark": watermark},
    )


def known_tasks(db: Connection, *, place: Place, asset_uids: Sequence[str]) -> dict[str, KnownTask]:
    """The tasks of these assets in a project, by asset_uid, with every prediction that the server has."""
    rows = db.execute(
        text(
            """SELECT t.id, t.task_id, t.asset_uid, max(o.width) AS width, max(o.height) AS height,
                      jsonb_object_agg(p.model_version, p.asset_id) AS asset_ids
               FROM ls_task t JOIN ls_prediction p ON p.ls_task_id = t.id AND p.state = 'done'
               JOIN outcome o ON o.asset_id = p.asset_id
               WHERE t.server = :server AND t.project_id = :project_id AND t.asset_uid = ANY(:uids)
               GROUP BY t.id"""
        ),
        {**place.values(), "uids": list(asset_uids)},
    )
    return {
        row.asset_uid: KnownTask(
            ls_task_id=row.id, task_id=row.task_id, size_hw=(row.height, row.width), asset_ids=row.asset_ids
        )
        for row in rows
    }


def replace_annotations(db: Connection, *, annotations: Mapping[int, Sequence[AnnotationRow]]) -> None:
    """Make these the annotations of their tasks, by ls_task id; a task without any has lost those it had.

    Lock the tasks first, so that two readers leave the one's or the other's.
    """
    ids = sorted(annotations)
    db.execute(text("SELECT 1 FROM ls_task WHERE id = ANY(:ids) ORDER BY id FOR UPDATE"), {"ids": ids})
    db.execute(text("DELETE FROM ls_annotation WHERE ls_task_id = ANY(:ids)"), {"ids": ids})
    for ls_task_id in ids:
        for annotation in annotations[ls_task_id]:
            _insert_annotation(db, ls_task_id, annotation)


def _insert_annotation(db: Connection, ls_task_id: int, annotation: AnnotationRow) -> None:
    names = (
        "annotation_id", "annotator", "standing", "ground_truth", "lead_seconds", "updated_at", "model_version",
        "asset_id", "unread",
    )  # fmt: skip
    made = db.execute(
        text(
            f"""INSERT INTO ls_annotation (ls_task_id, {", ".join(names)})
                SELECT id, {", ".join(":" + name for name in names)} FROM ls_task WHERE id = :ls_task_id RETURNING id"""
        ),
        {"ls_task_id": ls_task_id, **{name: getattr(annotation, name) for name in names}},
    ).scalar_one_or_none()
    if made is None or not annotation.regions:
        return
    columns = ("verdict", "mask_n", "label", "iou", "counts", "area_px", "bbox_x", "bbox_y", "bbox_w", "bbox_h")
    statement = text(
        f"""INSERT INTO ls_region (ls_annotation_id, i, {", ".join(columns)})
            VALUES (:id, :i, {", ".join(":" + column for column in columns)})"""
    )
    values = []
    for i, region in enumerate(annotation.regions):
        box = dict(zip(columns[-4:], region.bbox_xywh or (None,) * 4, strict=True))
        values.append({"id": made, "i": i, **{name: getattr(region, name) for name in columns[:6]}, **box})
    db.execute(statement, values)


# ------------------------------------------------------------------------------------------------ what is told

# The assets of a job that a project has, with the task and whose masks it shows.
_MINE = """mine AS (
    SELECT my.id, my.key, t.id AS ls_task_id, t.task_id, p.asset_id, p.model_version
    FROM asset my JOIN job wanted ON wanted.id = my.job_id
    JOIN job same ON same.source = wanted.source AND same.model_version = wanted.model_version
    JOIN asset a ON a.job_id = same.id AND a.key = my.key
    JOIN ls_prediction p ON p.asset_id = a.id AND p.model_version = wanted.model_version AND p.state = 'done'
    JOIN ls_task t ON t.id = p.ls_task_id
    WHERE my.job_id = :job_id AND t.server = :server AND t.project_id = :project_id)"""
# What was shown in Label Studio: SAM's estimate may exceed 1, and a model may give none that is a number.
_SCORE = "CASE WHEN m.predicted_iou = 'NaN' THEN 0 ELSE round(greatest(0, least(1, m.predicted_iou))::numeric, 4) END"


def tallies(db: Connection, *, job_id: int, place: Place) -> list[Tally]:
    """The chosen annotations of a job's assets, whichever version they began from, mask by mask.

    An added mask counts under the person's label, the others under the model's.
    """
    rows = db.execute(
        text(
            f"""WITH {_MINE}
                SELECT n.model_version, CASE WHEN r.verdict = 'added' THEN r.label ELSE coalesce(m.label, 'object') END
                           AS label,
                       CASE WHEN m.n IS NOT NULL THEN least(19, floor({_SCORE} * 20))::int END AS band,
                       r.verdict, count(*) AS masks,
                       count(*) FILTER (WHERE r.verdict = 'edited' AND r.label <> coalesce(m.label, 'object'))
                           AS relabelled,
                       count(r.iou) AS measured, coalesce(sum(r.iou), 0)::float AS iou_sum
                FROM mine JOIN ls_annotation n ON n.ls_task_id = mine.ls_task_id AND n.standing = 'chosen'
                JOIN ls_region r ON r.ls_annotation_id = n.id
                LEFT JOIN mask m ON m.asset_id = n.asset_id AND m.n = r.mask_n
                GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"""
        ),
        {"job_id": job_id, **place.values()},
    ).mappings()
    return [Tally(**{**row, "verdict": Verdict(row["verdict"])}) for row in rows]


def kept_by_score(db: Connection, *, job_id: int, place: Place) -> list[tuple[float, int, int]]:
    """(score, predictions kept untouched, predictions) of each score of a job's judged predictions, highest first."""
    rows = db.execute(
        text(
            f"""WITH {_MINE}
                SELECT ({_SCORE})::float AS score, count(*) FILTER (WHERE r.verdict = 'kept') AS kept, count(*) AS n
                FROM mine JOIN ls_annotation n ON n.ls_task_id = mine.ls_task_id AND n.standing = 'chosen'
                     AND n.model_version = mine.model_version
                JOIN ls_region r ON r.ls_annotation_id = n.id
                JOIN mask m ON m.asset_id = n.asset_id AND m.n = r.mask_n
                GROUP BY 1 ORDER BY 1 DESC"""
        ),
        {"job_id": job_id, **place.values()},
    )
    return [(row.score, row.kept, row.n) for row in rows]


def asset_counts(db: Connection, *, job_id: int, place: Place) -> AssetCounts:
    """What became of the assets that the project has of a job."""
    row = (
        db.execute(
            text(
                f"""WITH {_MINE}, one AS (
                        SELECT n.id IS NOT NULL AS annotated, n.model_version = mine.model_version AS ours,
                               NOT EXISTS (SELECT 1 FROM ls_region r
                                           WHERE r.ls_annotation_id = n.id AND r.verdict <> 'kept')
                                   AND coalesce(n.unread, 0) = 0 AS untouched,
                               EXISTS (SELECT 1 FROM ls_annotation s WHERE s.ls_task_id = mine.ls_task_id
                                       AND s.standing = 'skipped') AS skipped,
                               EXISTS (SELECT 1 FROM ls_annotation s WHERE s.ls_task_id = mine.ls_task_id
                                       AND s.standing = 'other') AS several,
                               coalesce(n.unread, 0) AS unread
                        FROM mine LEFT JOIN ls_annotation n
                             ON n.ls_task_id = mine.ls_task_id AND n.standing = 'chosen')
                    SELECT count(*) AS published,
                           count(*) FILTER (WHERE annotated AND ours AND untouched) AS untouched,
                           count(*) FILTER (WHERE annotated AND ours AND NOT untouched) AS corrected,
                           count(*) FILTER (WHERE annotated AND ours IS NOT TRUE) AS elsewhere,
                           count(*) FILTER (WHERE NOT annotated AND skipped) AS skipped,
                           count(*) FILTER (WHERE NOT annotated AND NOT skipped) AS waiting,
                           count(*) FILTER (WHERE several) AS several_annotators,
                           coalesce(sum(unread), 0)::int AS unread_regions
                    FROM one"""
            ),
            {"job_id": job_id, **place.values()},
        )
        .mappings()
        .one()
    )
    return AssetCounts(**row)


def annotators(db: Connection, *, job_id: int, place: Place) -> list[Annotator]:
    """Who did what on a job's assets; resubmitted annotations count as one each, for each took its time."""
    rows = db.execute(
        text(
            f"""WITH {_MINE}
                SELECT n.annotator, count(*) FILTER (WHERE n.standing <> 'skipped') AS submitted,
                       count(*) FILTER (WHERE n.standing = 'skipped') AS skipped,
                       coalesce(sum(n.lead_seconds), 0)::float AS seconds_total,
                       percentile_cont(0.5) WITHIN GROUP (ORDER BY n.lead_seconds)
                           FILTER (WHERE n.standing <> 'skipped') AS seconds_median
                FROM mine JOIN ls_annotation n ON n.ls_task_id = mine.ls_task_id
                GROUP BY n.annotator ORDER BY n.annotator"""
        ),
        {"job_id": job_id, **place.values()},
    ).mappings()
    return [Annotator(**row) for row in rows]


def lead_seconds(db: Connection, *, job_id: int, place: Place) -> tuple[int, float, float | None, float | None]:
    """Of the tasks that somebody submitted and whose time is known: how many, the sum of their times, the mean and the
    median of a task. A task's time is what everyone took for it together, resubmissions too."""
    row = db.execute(
        text(
            f"""WITH {_MINE}, took AS (
                    SELECT sum(n.lead_seconds) AS seconds FROM mine
                    JOIN ls_annotation n ON n.ls_task_id = mine.ls_task_id AND n.standing <> 'skipped'
                    GROUP BY mine.id)
                SELECT count(seconds), coalesce(sum(seconds), 0)::float, avg(seconds)::float,
                       percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds) FROM took"""
        ),
        {"job_id": job_id, **place.values()},
    ).one()
    return row[0], row[1], row[2], row[3]


def worst_assets(db: Connection, *, job_id: int, place: Place, limit: int) -> list[Reviewed]:
    """The corrected assets of a job, those that agree least with the prediction first."""
    rows = db.execute(
        text(
            f"""WITH {_MINE}
                SELECT mine.id AS asset_id, mine.key, mine.task_id, max(o.height) AS height, max(o.width) AS width,
                       (sum(CASE r.verdict WHEN 'kept' THEN 1 WHEN 'edited' THEN coalesce(r.iou, 0) ELSE 0 END)
                        / count(*))::float AS agreement,
                       count(*) FILTER (WHERE r.verdict = 'kept') AS kept,
                       count(*) FILTER (WHERE r.verdict = 'edited') AS edited,
                       count(*) FILTER (WHERE r.verdict = 'deleted') AS deleted,
                       count(*) FILTER (WHERE r.verdict = 'added') AS added
                FROM mine JOIN ls_annotation n ON n.ls_task_id = mine.ls_task_id AND n.standing = 'chosen'
                     AND n.model_version = mine.model_version
                JOIN ls_region r ON r.ls_annotation_id = n.id
                JOIN outcome o ON o.asset_id = mine.asset_id
                GROUP BY mine.id, mine.key, mine.task_id HAVING bool_or(r.verdict <> 'kept')
                ORDER BY agreement, mine.id LIMIT :limit"""
        ),
        {"job_id": job_id, **place.values(), "limit": limit},
    ).mappings()
    names = ("asset_id", "key", "task_id", "agreement", "kept", "edited", "deleted", "added")
    return [Reviewed(size_hw=(row["height"], row["width"]), **{name: row[name] for name in names}) for row in rows]


# ------------------------------------------------------------------------------------------------ what is exported


def annotated_assets(db: Connection, *, job_id: int) -> int:
    """How many assets of a job have an annotation that counts, in any project."""
    statement = text(f"SELECT count(*) FROM ({_CHOSEN}) AS chosen")
    return int(db.execute(statement, {"job_id": job_id, "ids": None}).scalar_one())


def chosen_masks(db: Connection, *, job_id: int, asset_ids: Sequence[int]) -> dict[int, list[ReviewedMask]]:
    """What people made of these assets of a job: the masks of each one's annotation, none where all were deleted.

    An asset without an annotation is not in it. Where several projects have one, marked ground truth goes before the
    newest. A mask that was kept is the stored one, run by run.
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
        asset_id: [_reviewed_mask(asset_id, n, row) for n, row in enumerate(r for r in group if r.counts is not None)]
        for asset_id, group in groupby(rows, key=attrgetter("my_id"))
    }


_CHOSEN = """SELECT DISTINCT ON (my.id) my.id, n.id AS annotation, n.asset_id
             FROM asset my JOIN job wanted ON wanted.id = my.job_id
             JOIN job same ON same.source = wanted.source AND same.model_version = wanted.model_version
             JOIN asset a ON a.job_id = same.id AND a.key = my.key
             JOIN ls_prediction p ON p.asset_id = a.id AND p.model_version = wanted.model_version AND p.state = 'done'
             JOIN ls_annotation n ON n.ls_task_id = p.ls_task_id AND n.standing = 'chosen'
             WHERE my.job_id = :job_id AND (CAST(:ids AS bigint[]) IS NULL OR my.id = ANY(CAST(:ids AS bigint[])))
             ORDER BY my.id, n.ground_truth DESC, n.updated_at DESC, n.id"""


def _reviewed_mask(asset_id: int, n: int, row: Any) -> ReviewedMask:
    return ReviewedMask(
        asset_id=asset_id,
        n=n,
        counts=row.counts,
        bbox_xywh=(row.bbox_x, row.bbox_y, row.bbox_w, row.bbox_h),
        area_px=row.area_px,
        predicted_iou=row.predicted_iou,
        stability_score=row.stability_score,
        label=row.label,
        prompt=row.prompt,
        verdict=Verdict(row.verdict),
    )


def _batches(assets: Iterator[LabeledAsset], size: int) -> Iterator[list[LabeledAsset]]:
    batch: list[LabeledAsset] = []
    for asset in assets:
        batch.append(asset)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def reviewed_assets(
    db: Connection, *, job_id: int, min_score: float | None = None, page: int = 10
) -> Iterator[LabeledAsset]:
    """Stream a job's assets in key order as people left them; those without an annotation only with min_score, with
    their predictions of that score at least."""
    for batch in _batches(queries.labeled_assets(db, job_id=job_id, page=page), page):
        chosen = chosen_masks(db, job_id=job_id, asset_ids=[asset.asset_id for asset in batch])
        for asset in batch:
            if asset.asset_id in chosen:
                left = list[StoredMask](chosen[asset.asset_id])
                yield ReviewedAsset(asset_id=asset.asset_id, key=asset.key, size_hw=asset.size_hw, masks=left)
            elif min_score is not None:
                yield _with_score(asset, min_score)


def scored_assets(db: Connection, *, job_id: int, min_score: float, page: int = 10) -> Iterator[LabeledAsset]:
    """Stream a job's labeled assets in key order with their predictions of that score at least."""
    for asset in queries.labeled_assets(db, job_id=job_id, page=page):
        yield _with_score(asset, min_score)


def _with_score(asset: LabeledAsset, min_score: float) -> LabeledAsset:
    return replace(asset, masks=[mask for mask in asset.masks if mask.predicted_iou >= min_score])
