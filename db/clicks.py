"""What a click in Label Studio needs of the database: its task, the stored masks under it, and its own row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

from db.publishing import LsProject
from db.results import StoredMask
from db.review_counts import MINE
from db.states import AnsweredBy, ClickKind

_MASK = "n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou, stability_score, label, prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickedTask:
    """A task of ours. asset_id: the asset that owns the masks of its newest prediction. size_hw: of the image, px."""

    ls_task_id: int
    asset_id: int
    size_hw: tuple[int, int]
    model_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Click:
    """One answer. prompt_id: region id of the first prompt, the same for all clicks on one object."""

    ls_task_id: int
    kind: ClickKind
    answered_by: AnsweredBy
    label: str | None
    milliseconds: int
    prompt_id: str
    region_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickTally:
    """Clicks under one label. objects: groups of clicks on one thing. accepted: objects whose last answer is in the
    chosen annotation. by_decoder, by_stored: clicks by who answered."""

    label: str
    clicks: int
    objects: int
    accepted: int
    by_decoder: int
    by_stored: int
    milliseconds_median: float


def clicked_task(db: Connection, *, ls_project: LsProject, task_id: int, asset_uid: str) -> ClickedTask | None:
    """The task with this number and this asset. None unless both belong together in this project."""
    row = db.execute(
        text(
            """SELECT t.id, p.asset_id, p.model_version, o.width, o.height
               FROM ls_task t JOIN ls_prediction p ON p.ls_task_id = t.id AND p.state = 'done'
               JOIN outcome o ON o.asset_id = p.asset_id AND o.width IS NOT NULL
               WHERE t.server = :server AND t.project_id = :project_id AND t.task_id = :task_id
                 AND t.asset_uid = :asset_uid
               ORDER BY p.sent_at DESC, p.asset_id DESC LIMIT 1"""
        ),
        {**ls_project.values(), "task_id": task_id, "asset_uid": asset_uid},
    ).one_or_none()
    if row is None:
        return None
    return ClickedTask(
        ls_task_id=row.id, asset_id=row.asset_id, size_hw=(row.height, row.width), model_version=row.model_version
    )


def assets_of_tasks(db: Connection, *, ls_project: LsProject, asset_uids: Sequence[str]) -> list[int]:
    """The asset that owns the newest masks of each of these tasks, in the order of asset_uids. Unknown ones are left
    out."""
    rows = db.execute(
        text(
            """SELECT DISTINCT ON (u.place) u.place, p.asset_id
               FROM unnest(CAST(:uids AS text[])) WITH ORDINALITY u (uid, place)
               JOIN ls_task t ON t.server = :server AND t.project_id = :project_id AND t.asset_uid = u.uid
               JOIN ls_prediction p ON p.ls_task_id = t.id AND p.state = 'done'
               ORDER BY u.place, p.sent_at DESC, p.asset_id DESC"""
        ),
        {**ls_project.values(), "uids": list(asset_uids)},
    )
    return [row.asset_id for row in rows]


def models_of_projects(db: Connection, *, ls_projects: Sequence[LsProject]) -> list[str]:
    """The models of the jobs that were published to these projects of one server."""
    rows = db.execute(
        text(
            """SELECT DISTINCT model FROM job WHERE id IN (
                   SELECT p.job_id FROM ls_task t JOIN ls_prediction p ON p.ls_task_id = t.id
                   WHERE t.server = ANY(:servers) AND t.project_id = ANY(:projects)) ORDER BY model"""
        ),
        {"servers": [one.server for one in ls_projects], "projects": [one.project_id for one in ls_projects]},
    )
    return list(rows.scalars())


def masks_around(db: Connection, *, asset_id: int, x: int, y: int) -> list[StoredMask]:
    """The masks whose boxes hold the pixel, the smallest area first."""
    rows = db.execute(
        text(
            f"""SELECT {_MASK} FROM mask
                WHERE asset_id = :asset_id AND bbox_x <= :x AND bbox_y <= :y AND bbox_x + bbox_w > :x
                  AND bbox_y + bbox_h > :y ORDER BY area_px, n"""
        ),
        {"asset_id": asset_id, "x": x, "y": y},
    )
    return [StoredMask.from_row(row, asset_id=asset_id, n=row.n) for row in rows]


def mask_of_box(db: Connection, *, asset_id: int, box_xyxy: tuple[float, float, float, float]) -> StoredMask | None:
    """The mask whose box has the highest IoU with this one, in pixels. None if no box touches it."""
    names = ("x0", "y0", "x1", "y1")
    row = db.execute(
        text(
            f"""SELECT {_MASK} FROM (
                    SELECT *, greatest(0, least(bbox_x + bbox_w, :x1) - greatest(bbox_x, :x0))
                              * greatest(0, least(bbox_y + bbox_h, :y1) - greatest(bbox_y, :y0)) AS shared
                    FROM mask WHERE asset_id = :asset_id) touched
                WHERE shared > 0
                ORDER BY shared / (bbox_w::float8 * bbox_h + (:x1 - :x0) * (:y1 - :y0) - shared) DESC, n LIMIT 1"""
        ),
        {"asset_id": asset_id, **dict(zip(names, box_xyxy, strict=True))},
    ).one_or_none()
    return None if row is None else StoredMask.from_row(row, asset_id=asset_id, n=row.n)


def masks_by_number(db: Connection, *, asset_id: int, numbers: Sequence[int]) -> list[StoredMask]:
    """The masks of an asset with these numbers `n`. Unknown numbers are left out."""
    statement = text(f"SELECT {_MASK} FROM mask WHERE asset_id = :asset_id AND n = ANY(:numbers) ORDER BY n")
    rows = db.execute(statement, {"asset_id": asset_id, "numbers": list(numbers)})
    return [StoredMask.from_row(row, asset_id=asset_id, n=row.n) for row in rows]


def add_click(db: Connection, *, click: Click) -> None:
    names = Click.__dataclass_fields__
    columns, values = ", ".join(names), ", ".join(f":{name}" for name in names)
    db.execute(text(f"INSERT INTO click ({columns}) VALUES ({values})"), {name: getattr(click, name) for name in names})


def click_tallies(db: Connection, *, job_id: int, ls_project: LsProject) -> list[ClickTally]:
    """Count the clicks on a job's tasks, by label."""
    rows = db.execute(
        text(
            f"""WITH {MINE},
                object AS (
                    SELECT c.ls_task_id, c.prompt_id, max(coalesce(c.label, 'object')) AS label,
                           array_agg(c.region_id) FILTER (WHERE c.region_id IS NOT NULL) AS region_ids,
                           bool_or(c.kind = 'refine') AS refined
                    FROM (SELECT DISTINCT ls_task_id FROM mine) task JOIN click c USING (ls_task_id) GROUP BY 1, 2),
                judged AS (
                    SELECT label, ls_task_id, prompt_id, EXISTS (
                               SELECT 1 FROM ls_annotation a JOIN ls_region r ON r.ls_annotation_id = a.id
                               WHERE a.ls_task_id = object.ls_task_id AND a.standing = 'chosen'
                                 AND (r.region_id = ANY(region_ids)
                                      OR 'm' || a.asset_id || '-' || r.mask_n = ANY(region_ids)
                                         AND (r.verdict = 'edited' OR r.verdict = 'kept' AND NOT refined))) AS accepted
                    FROM object)
                SELECT j.label, count(*) AS clicks, count(DISTINCT (j.ls_task_id, j.prompt_id)) AS objects,
                       count(DISTINCT (j.ls_task_id, j.prompt_id)) FILTER (WHERE accepted) AS accepted,
                       count(*) FILTER (WHERE c.answered_by = 'decoder') AS by_decoder,
                       count(*) FILTER (WHERE c.answered_by = 'stored') AS by_stored,
                       percentile_cont(0.5) WITHIN GROUP (ORDER BY c.milliseconds) AS milliseconds_median
                FROM judged j JOIN click c USING (ls_task_id, prompt_id) GROUP BY 1 ORDER BY 1"""
        ),
        {"job_id": job_id, **ls_project.values()},
    ).mappings()
    return [ClickTally(**row) for row in rows]
