"""What Label Studio has of a job: counts, refused assets, projects. Only reads."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

from db.publishing import LsProject


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What one project has of a job.

    masks_shown: masks that regions show. masks_left_out: masks that no region shows. iou_mean, iou_worst: IoU 0..1 of
    the shown masks with their regions.
    """

    server: str
    project_id: int
    assets: int
    sending: int
    refused: int
    masks_shown: int
    masks_left_out: int
    iou_mean: float | None
    iou_worst: float | None


def count_done(db: Connection, *, ls_project: LsProject, model_version: str) -> int:
    """How many predictions of a version the project has, as far as we know."""
    statement = text(
        """SELECT count(*) FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id
           WHERE t.server = :server AND t.project_id = :project_id AND p.model_version = :version
             AND p.state = 'done'"""
    )
    values = {**ls_project.values(), "version": model_version}
    return int(db.execute(statement, values).scalar_one())


def count_tasks(db: Connection, *, ls_project: LsProject) -> int:
    """How many tasks of ours the project has, as far as we know."""
    statement = text(
        """SELECT count(*) FROM ls_task WHERE server = :server AND project_id = :project_id AND task_id IS NOT NULL"""
    )
    return int(db.execute(statement, ls_project.values()).scalar_one())


def refused_of(db: Connection, *, job_id: int, ls_project: LsProject) -> list[tuple[str, str]]:
    """The uri and the reason of each asset of a job that the project refused, in the order of the assets."""
    statement = text(
        """SELECT t.uri, p.error FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id
           WHERE p.job_id = :job_id AND t.server = :server AND t.project_id = :project_id AND p.state = 'refused'
           ORDER BY p.asset_id"""
    )
    values = {"job_id": job_id, **ls_project.values()}
    return [(row.uri, row.error) for row in db.execute(statement, values)]


def published(db: Connection, *, job_id: int) -> list[Published]:
    """What each project of each server has of a job.

    Assets that an earlier job published under the same model version count for the earlier job.
    """
    rows = db.execute(
        text(
            """SELECT c.*, (
                   -- From the lowest one on: with one project that is the first.
                   SELECT p.iou_min FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id
                   WHERE p.job_id = :job_id AND p.state = 'done' AND p.iou_min IS NOT NULL
                     AND t.server = c.server AND t.project_id = c.project_id
                   ORDER BY p.iou_min LIMIT 1)::float AS iou_worst
               FROM (SELECT server, project_id,
                            coalesce(sum(predictions) FILTER (WHERE state = 'done'), 0)::bigint AS assets,
                            coalesce(sum(predictions) FILTER (WHERE state = 'sending'), 0)::bigint AS sending,
                            coalesce(sum(predictions) FILTER (WHERE state = 'refused'), 0)::bigint AS refused,
                            coalesce(sum(masks_shown) FILTER (WHERE state = 'done'), 0)::bigint AS masks_shown,
                            coalesce(sum(masks_left_out) FILTER (WHERE state = 'done'), 0)::bigint AS masks_left_out,
                            sum(iou_sum) FILTER (WHERE state = 'done')
                            / nullif(sum(masks_shown) FILTER (WHERE state = 'done'), 0)::float AS iou_mean
                     FROM prediction_counter WHERE job_id = :job_id
                     GROUP BY server, project_id HAVING sum(predictions) > 0) c
               ORDER BY server, project_id"""
        ),
        {"job_id": job_id},
    ).mappings()
    return [Published(**row) for row in rows]
