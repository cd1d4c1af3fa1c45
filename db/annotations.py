"""SQL of the annotations that people made from the predictions, as last read from Label Studio.

The job's model version links an asset of the job to its task. An earlier job over the same source may have published
the same version. Then the task and the masks are that job's, and the counts are the same for both jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, text

from db.publishing import LsProject
from db.states import AnnotationStatus, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownTask:
    """A task of ours as the outbox knows it.

    asset_ids: by model version, the asset that owns the masks of that prediction. sizes_hw: of the picture that each of
    these assets had, if it was looked at; a picture that was replaced under its key may have another size. is_whole: no
    prediction of the task is in flight or in doubt.
    """

    ls_task_id: int
    task_id: int | None
    asset_ids: Mapping[str, int]
    sizes_hw: Mapping[int, tuple[int, int]]
    is_whole: bool = True

    def size_of(self, asset_id: int | None) -> tuple[int, int] | None:
        """The size of the picture under this asset's masks. asset_id: None for an annotation from no prediction.

        Where that is not known, the one size of all others, and None if they have several or none.
        """
        if asset_id is not None and asset_id in self.sizes_hw:
            return self.sizes_hw[asset_id]
        sizes = set(self.sizes_hw.values())
        return sizes.pop() if len(sizes) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionRow:
    """One mask of a chosen annotation.

    iou: only for an edited mask: its IoU 0..1 with the mask that was shown. counts, bbox_xywh, area_px: the mask that
    a person drew; None where the stored mask is unchanged. region_id: of an added mask that began as an answer to a
    click.
    """

    verdict: Verdict
    mask_n: int | None
    label: str
    iou: float | None = None
    counts: str | None = None
    bbox_xywh: tuple[int, int, int, int] | None = None
    area_px: int | None = None
    region_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotationRow:
    """One annotation as read. regions: filled only when it is the chosen annotation of its task."""

    annotation_id: int
    annotator: int | None
    standing: AnnotationStatus
    ground_truth: bool
    lead_seconds: float | None
    updated_at: datetime
    model_version: str | None
    asset_id: int | None
    unread: int = 0
    regions: Sequence[RegionRow] = ()


def watermark(db: Connection, *, ls_project: LsProject) -> datetime | None:
    """The time up to which the project's annotations were read, on its server's clock. None before the first read."""
    statement = text("SELECT watermark FROM ls_pull WHERE server = :server AND project_id = :project_id")
    return db.execute(statement, ls_project.values()).scalar_one_or_none()


def set_watermark(db: Connection, *, ls_project: LsProject, watermark: datetime) -> None:
    """Store the time up to which the project's annotations were read."""
    db.execute(
        text(
            """INSERT INTO ls_pull (server, project_id, watermark) VALUES (:server, :project_id, :watermark)
               ON CONFLICT (server, project_id) DO UPDATE SET watermark = excluded.watermark, pulled_at = now()"""
        ),
        {**ls_project.values(), "watermark": watermark},
    )


def known_tasks(db: Connection, *, ls_project: LsProject, asset_uids: Sequence[str]) -> dict[str, KnownTask]:
    """The tasks of these assets in a project, by asset_uid. Each has all its predictions that the server holds."""
    rows = db.execute(
        text(
            """SELECT t.id, t.task_id, t.asset_uid, jsonb_object_agg(p.model_version, p.asset_id) AS asset_ids,
                      jsonb_object_agg(p.asset_id, jsonb_build_array(o.height, o.width))
                          FILTER (WHERE o.width IS NOT NULL) AS sizes_hw,
                      NOT EXISTS (SELECT 1 FROM ls_prediction s WHERE s.ls_task_id = t.id AND s.state = 'sending')
                          AS is_whole
               FROM ls_task t JOIN ls_prediction p ON p.ls_task_id = t.id AND p.state = 'done'
               JOIN outcome o ON o.asset_id = p.asset_id
               WHERE t.server = :server AND t.project_id = :project_id AND t.asset_uid = ANY(:uids)
               GROUP BY t.id"""
        ),
        {**ls_project.values(), "uids": list(asset_uids)},
    )
    return {row.asset_uid: _known_task(row) for row in rows}


def _known_task(row: Row[Any]) -> KnownTask:
    return KnownTask(
        ls_task_id=row.id,
        task_id=row.task_id,
        asset_ids=row.asset_ids,
        sizes_hw={int(asset_id): (height, width) for asset_id, (height, width) in (row.sizes_hw or {}).items()},
        is_whole=row.is_whole,
    )


def remember_unjudged(db: Connection, *, ls_project: LsProject, asset_uids: Mapping[int, str]) -> None:
    """Remember annotated tasks, by Label Studio's id, whose prediction is not known yet."""
    db.execute(
        text(
            """INSERT INTO ls_unjudged (server, project_id, task_id, asset_uid)
               SELECT :server, :project_id, * FROM unnest(CAST(:ids AS bigint[]), CAST(:uids AS text[]))
               ON CONFLICT (server, project_id, task_id) DO UPDATE SET asset_uid = excluded.asset_uid"""
        ),
        {**ls_project.values(), "ids": list(asset_uids), "uids": list(asset_uids.values())},
    )


def forget_unjudged(db: Connection, *, ls_project: LsProject, task_ids: Sequence[int]) -> None:
    """Forget remembered tasks: they have been judged, or are gone."""
    statement = "DELETE FROM ls_unjudged WHERE server = :server AND project_id = :project_id AND task_id = ANY(:ids)"
    db.execute(text(statement), {**ls_project.values(), "ids": list(task_ids)})


def judgeable(db: Connection, *, ls_project: LsProject) -> dict[int, str]:
    """The remembered tasks whose prediction is known by now: the asset_uid of each by Label Studio's id."""
    rows = db.execute(
        text(
            """SELECT u.task_id, u.asset_uid FROM ls_unjudged u
               JOIN ls_task t USING (server, project_id, task_id, asset_uid)
               WHERE u.server = :server AND u.project_id = :project_id
                 AND EXISTS (SELECT 1 FROM ls_prediction p WHERE p.ls_task_id = t.id AND p.state = 'done')
               ORDER BY u.task_id"""
        ),
        ls_project.values(),
    )
    return {row.task_id: row.asset_uid for row in rows}


def replace_annotations(
    db: Connection, *, annotations: Mapping[int, Sequence[AnnotationRow]], changed_at: Mapping[int, datetime]
) -> None:
    """Replace the annotations of these tasks (by ls_task id). An empty list removes all annotations of a task.

    changed_at: when Label Studio had last changed each task as it was read. When two readers write at once, the result
    for a task is all from the one that read its newer state, for a slow one may write last.
    """
    ids = _lock_older(db, changed_at={ls_task_id: changed_at[ls_task_id] for ls_task_id in sorted(annotations)})
    db.execute(text("DELETE FROM ls_annotation WHERE ls_task_id = ANY(:ids)"), {"ids": ids})
    for ls_task_id in ids:
        for annotation in annotations[ls_task_id]:
            _insert_annotation(db, ls_task_id, annotation)


def _lock_older(db: Connection, *, changed_at: Mapping[int, datetime]) -> list[int]:
    """Lock these tasks, and note the state that each was read in. Returns those of which no newer state is stored."""
    values = {"ids": list(changed_at), "moments": list(changed_at.values())}
    db.execute(text("SELECT 1 FROM ls_task WHERE id = ANY(:ids) ORDER BY id FOR UPDATE"), values)
    older = db.execute(
        text(
            """UPDATE ls_task SET changed_at = n.moment
               FROM unnest(CAST(:ids AS bigint[]), CAST(:moments AS timestamptz[])) AS n (id, moment)
               WHERE ls_task.id = n.id AND (changed_at IS NULL OR changed_at <= n.moment) RETURNING ls_task.id"""
        ),
        values,
    )
    return sorted(older.scalars())


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
    columns = (
        "verdict",
        "mask_n",
        "label",
        "iou",
        "counts",
        "area_px",
        "region_id",
        "bbox_x",
        "bbox_y",
        "bbox_w",
        "bbox_h",
    )
    statement = text(
        f"""INSERT INTO ls_region (ls_annotation_id, i, {", ".join(columns)})
            VALUES (:id, :i, {", ".join(":" + column for column in columns)})"""
    )
    values = []
    for i, region in enumerate(annotation.regions):
        box = dict(zip(columns[-4:], region.bbox_xywh or (None,) * 4, strict=True))
        values.append({"id": made, "i": i, **{name: getattr(region, name) for name in columns[:7]}, **box})
    db.execute(statement, values)
