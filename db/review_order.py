"""SQL of the order in which a job's assets are published: a temporary table of the publisher's connection.

The order of a whole job needs no memory here. It lasts as long as the connection that holds the project's lock.

Where assets and outcomes are both read in the order of ids, `:after` is asked of both. Postgres does not carry it from
one to the other. Without it a merge of the two reads the assets from the first one on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, text

from db.jobs import Job
from db.publishing import Candidate, LsProject

_COMPARED_JOBS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An asset of a job, and the same asset in the newest other model version that labeled it in the same size."""

    asset_id: int
    other_id: int
    size_hw: tuple[int, int]


def order_by_score(db: Connection, *, job_id: int, after_asset_id: int) -> None:
    """Order the job's labeled assets after this one by their masks' mean predicted IoU, the lowest first.

    Assets without masks come last.
    """
    _make_table(db)
    db.execute(
        text(
            """INSERT INTO publish_order (asset_id, rank)
               SELECT a.id, (SELECT avg(m.predicted_iou) FROM mask m WHERE m.asset_id = a.id)
               FROM asset a JOIN outcome o ON o.asset_id = a.id
               WHERE o.job_id = :job_id AND o.asset_id > :after AND a.id > :after
                 AND o.error_kind IS NULL AND o.width IS NOT NULL"""
        ),
        {"job_id": job_id, "after": after_asset_id},
    )
    _number(db)


def start_order(db: Connection) -> None:
    """Begin an order that `add_ranks` fills and `finish_order` ends."""
    _make_table(db)


def add_ranks(db: Connection, *, ranks: Mapping[int, float]) -> None:
    """Add assets to the order. Lower ranks come first."""
    db.execute(
        text("INSERT INTO publish_order (asset_id, rank) SELECT * FROM unnest(:ids, CAST(:ranks AS float8[]))"),
        {"ids": list(ranks), "ranks": list(ranks.values())},
    )


def finish_order(db: Connection) -> None:
    """Number the assets of the order."""
    _number(db)


def pairs(db: Connection, *, job: Job, after_asset_id: int, page: int) -> list[Pair]:
    """The next labeled assets of a job, by asset id, that another model version of the same source labeled too.

    Only the newest _COMPARED_JOBS jobs of other versions are looked at.
    A pair is left out when the picture has another size there: then it is another picture.
    """
    rows = db.execute(
        text(
            """WITH others AS MATERIALIZED (
                   SELECT id FROM job WHERE source = :source AND model_version <> :version
                   ORDER BY id DESC LIMIT :jobs)
               SELECT a.id, other.id AS other_id, o.width, o.height
               FROM outcome o JOIN asset a ON a.id = o.asset_id
               CROSS JOIN LATERAL (
                   SELECT b.id, p.width, p.height
                   FROM others j JOIN asset b ON b.job_id = j.id AND b.key = a.key
                   JOIN outcome p ON p.asset_id = b.id AND p.error_kind IS NULL AND p.width IS NOT NULL
                   ORDER BY j.id DESC LIMIT 1) other
               WHERE o.job_id = :job_id AND o.asset_id > :after AND a.id > :after AND o.error_kind IS NULL
                 AND o.width = other.width AND o.height = other.height
               ORDER BY o.asset_id LIMIT :page"""
        ),
        {
            "jobs": _COMPARED_JOBS,
            "job_id": job.id,
            "source": job.source,
            "version": job.model_version,
            "after": after_asset_id,
            "page": page,
        },
    )
    return [Pair(asset_id=row.id, other_id=row.other_id, size_hw=(row.height, row.width)) for row in rows]


def unpublished_in_order(
    db: Connection, *, ls_project: LsProject, after_position: int, page: int
) -> tuple[list[Candidate], int]:
    """The next assets of the order that have no prediction in any state in the project, and the last one's position."""
    rows = db.execute(
        text(
            """SELECT q.position, a.id, a.key, o.width, o.height
               FROM publish_order q JOIN asset a ON a.id = q.asset_id JOIN outcome o ON o.asset_id = a.id
               WHERE q.position > :after AND o.error_kind IS NULL AND o.width IS NOT NULL
                 AND NOT EXISTS (
                     SELECT 1 FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id
                     WHERE p.asset_id = a.id AND t.server = :server AND t.project_id = :project_id)
               ORDER BY q.position LIMIT :page"""
        ),
        {"after": after_position, **ls_project.values(), "page": page},
    ).all()
    found = [Candidate(asset_id=row.id, key=row.key, size_hw=(row.height, row.width)) for row in rows]
    return found, rows[-1].position if rows else after_position


def unpublished_without_order(
    db: Connection, *, job_id: int, ls_project: LsProject, after_asset_id: int, page: int
) -> list[Candidate]:
    """`publishing.unpublished`, but only what is not in the order."""
    rows = db.execute(
        text(
            """SELECT a.id, a.key, o.width, o.height FROM outcome o JOIN asset a ON a.id = o.asset_id
               WHERE o.job_id = :job_id AND o.asset_id > :after AND a.id > :after AND o.error_kind IS NULL
                 AND o.width IS NOT NULL
                 AND NOT EXISTS (SELECT 1 FROM publish_order q WHERE q.asset_id = o.asset_id)
                 -- Not NOT EXISTS: for that the planner may read all predictions, to make a hash of them.
                 AND (SELECT true FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id
                      WHERE p.asset_id = o.asset_id AND t.server = :server AND t.project_id = :project_id
                      LIMIT 1) IS NULL
               ORDER BY o.asset_id LIMIT :page"""
        ),
        {"job_id": job_id, "after": after_asset_id, **ls_project.values(), "page": page},
    )
    return [Candidate(asset_id=row.id, key=row.key, size_hw=(row.height, row.width)) for row in rows]


def _make_table(db: Connection) -> None:
    db.execute(text("SET LOCAL statement_timeout = 0"))  # a job may have a hundred million masks
    db.execute(text("DROP TABLE IF EXISTS publish_order"))
    db.execute(text("CREATE TEMPORARY TABLE publish_order (asset_id bigint PRIMARY KEY, rank float8, position bigint)"))


def _number(db: Connection) -> None:
    db.execute(text("SET LOCAL statement_timeout = 0"))
    db.execute(
        text(
            """UPDATE publish_order q SET position = n.position
               FROM (SELECT asset_id, row_number() OVER (ORDER BY rank NULLS LAST, asset_id) AS position
                     FROM publish_order) n
               WHERE n.asset_id = q.asset_id"""
        )
    )
    db.execute(text("CREATE INDEX ON publish_order (position)"))
    db.execute(text("ANALYZE publish_order"))
