"""SQL of the outbox for Label Studio: what was sent, and what the server confirmed.

Every write happens under `project_lock`, so each project has one writer. A prediction is stored as `sending` before
its request is sent, and as `done` after the answer. A row that is found as `sending` under the lock comes from a
publisher that has stopped. Only the server can say whether that prediction arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, text

from db.session import require_session
from db.states import LsState

_VERSION_PAGE = 100


@dataclass(frozen=True, slots=True)
class LsProject:
    """A project of a server. server: the address in the form that `label_studio.server_key` gives."""

    server: str
    project_id: int

    def values(self) -> dict[str, Any]:
        """The values to bind to a statement."""
        return {"server": self.server, "project_id": self.project_id}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A labeled asset that has no prediction of its own job in a project."""

    asset_id: int
    key: str
    size_hw: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An ls_task with its prediction of one model version. state None: it has none yet."""

    ls_task_id: int
    asset_uid: str
    task_id: int | None
    state: LsState | None
    asset_id: int | None = None
    age_seconds: float = 0.0  # seconds since it was last sent, on the database's clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """A prediction that is about to be sent. With `error` it is refused, and `error` is the reason."""

    asset_uid: str
    uri: str
    asset_id: int
    mask_count: int
    left_out: int
    iou_sum: float
    iou_min: float | None
    error: str | None = None


@contextmanager
def project_lock(engine: Engine, *, ls_project: LsProject, wait: Callable[[], None]) -> Iterator[Connection]:
    """Be the one publisher of a project. Yields the connection that holds the lock, outside a transaction.

    Do all writes on this connection. When it breaks, the lock is lost and the write fails too. `wait` is called each
    time another publisher holds the lock. It should sleep. An exception that it raises ends the waiting.
    """
    key = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
    name = {"name": f"maskfleet publish {ls_project.server} {ls_project.project_id}"}
    with engine.connect() as db:
        while True:
            with db.begin():
                require_session(db)
                held = db.execute(key, name).scalar_one()
            if held:
                break
            wait()
        try:
            yield db
        finally:
            # Without this the pool would keep the connection, and so the lock.
            db.invalidate()


def unpublished(
    db: Connection, *, job_id: int, ls_project: LsProject, after_asset_id: int, page: int
) -> list[Candidate]:
    """The next labeled assets of a job, by asset id, that have no prediction in any state in the project.

    Assets without a prompt in a job with prompts are left out: nobody looked at them, and their size is not known.
    """
    rows = db.execute(
        text(
            """SELECT a.id, a.key, o.width, o.height FROM outcome o JOIN asset a ON a.id = o.asset_id
               -- :after is asked of both: otherwise a merge of the two reads the assets from the first one on.
               WHERE o.job_id = :job_id AND o.asset_id > :after AND a.id > :after
                 AND o.error_kind IS NULL AND o.width IS NOT NULL
                 -- Not NOT EXISTS: for that the planner may read all predictions, to make a hash of them.
                 AND (SELECT true FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id
                      WHERE p.asset_id = o.asset_id AND t.server = :server AND t.project_id = :project_id
                      LIMIT 1) IS NULL
               ORDER BY o.asset_id LIMIT :page"""
        ),
        {"job_id": job_id, "after": after_asset_id, **ls_project.values(), "page": page},
    )
    return [Candidate(asset_id=row.id, key=row.key, size_hw=(row.height, row.width)) for row in rows]


_ROW = """t.id AS ls_task_id, t.asset_uid, t.task_id, p.state, p.asset_id,
          coalesce(extract(epoch FROM now() - p.sent_at), 0)::float AS age_seconds"""


def rows_of(db: Connection, *, ls_project: LsProject, model_version: str, asset_uids: Sequence[str]) -> dict[str, Row]:
    """The stored rows of these assets in a project, by asset_uid. Assets without a row are left out."""
    statement = text(
        f"""SELECT {_ROW} FROM ls_task t
            LEFT JOIN ls_prediction p ON p.ls_task_id = t.id AND p.model_version = :version
            WHERE t.server = :server AND t.project_id = :project_id AND t.asset_uid = ANY(:uids)"""
    )
    values = {**ls_project.values(), "version": model_version, "uids": list(asset_uids)}
    return {row["asset_uid"]: _row(row) for row in db.execute(statement, values).mappings()}


def versions_in_doubt(db: Connection, *, ls_project: LsProject) -> list[str]:
    """The model versions of predictions that were being sent when their publisher stopped."""
    statement = text(
        """SELECT DISTINCT p.model_version FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id
           WHERE t.server = :server AND t.project_id = :project_id AND p.state = 'sending' ORDER BY 1"""
    )
    return list(db.execute(statement, ls_project.values()).scalars())


def version_rows(
    db: Connection,
    *,
    ls_project: LsProject,
    model_version: str,
    state: LsState,
    after_ls_task_id: int = 0,
) -> list[Row]:
    """The next predictions of a version in a state, by ls_task id, from any job."""
    statement = text(
        f"""SELECT {_ROW} FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id
            WHERE t.server = :server AND t.project_id = :project_id AND p.model_version = :version
              AND p.state = :state AND t.id > :after AND p.ls_task_id > :after
            ORDER BY t.id LIMIT :page"""
    )
    values = {
        **ls_project.values(),
        "version": model_version,
        "state": state,
        "after": after_ls_task_id,
        "page": _VERSION_PAGE,
    }
    return [_row(row) for row in db.execute(statement, values).mappings()]


def write_intents(
    db: Connection, *, ls_project: LsProject, job_id: int, model_version: str, intents: Sequence[Intent]
) -> dict[str, int]:
    """Store what is about to be sent, or was refused. Returns the ls_task id of each asset_uid."""
    values = {
        **ls_project.values(),
        "job_id": job_id,
        "version": model_version,
        **{
            name: [getattr(intent, name) for intent in intents]
            for name in ("asset_uid", "uri", "asset_id", "mask_count", "left_out", "iou_sum", "iou_min", "error")
        },
    }
    db.execute(
        text(
            """INSERT INTO ls_task (server, project_id, asset_uid, uri)
               SELECT :server, :project_id, * FROM unnest(CAST(:asset_uid AS text[]), CAST(:uri AS text[]))
               ON CONFLICT ON CONSTRAINT ls_task_once_a_project DO NOTHING"""
        ),
        values,
    )
    written = db.execute(
        text(
            """INSERT INTO ls_prediction (ls_task_id, model_version, asset_id, job_id, state, error, mask_count,
                                          left_out, iou_sum, iou_min)
               SELECT t.id, :version, i.asset_id, :job_id, CASE WHEN i.error IS NULL THEN 'sending' ELSE 'refused' END,
                      i.error, i.mask_count, i.left_out, i.iou_sum, i.iou_min
               FROM unnest(CAST(:asset_uid AS text[]), CAST(:asset_id AS bigint[]), CAST(:mask_count AS int[]),
                           CAST(:left_out AS int[]), CAST(:iou_sum AS real[]), CAST(:iou_min AS real[]),
                           CAST(:error AS text[]))
                    AS i (asset_uid, asset_id, mask_count, left_out, iou_sum, iou_min, error)
               JOIN ls_task t ON t.server = :server AND t.project_id = :project_id AND t.asset_uid = i.asset_uid
               ON CONFLICT (ls_task_id, model_version) DO UPDATE
               SET asset_id = excluded.asset_id, job_id = excluded.job_id, state = excluded.state,
                   error = excluded.error, mask_count = excluded.mask_count, left_out = excluded.left_out,
                   iou_sum = excluded.iou_sum, iou_min = excluded.iou_min, sent_at = now()
               RETURNING ls_task_id, (SELECT asset_uid FROM ls_task WHERE id = ls_task_id)"""
        ),
        values,
    )
    return {asset_uid: ls_task_id for ls_task_id, asset_uid in written}


def mark_done(db: Connection, *, ls_project: LsProject, model_version: str, task_ids: dict[int, int]) -> None:
    """Store that the server has these predictions. task_ids: Label Studio's task id of each ls_task id."""
    set_task_ids(db, ls_project=ls_project, task_ids=task_ids)
    statement = "UPDATE ls_prediction SET state = 'done' WHERE model_version = :version AND ls_task_id = ANY(:ids)"
    db.execute(text(statement), {"version": model_version, "ids": list(task_ids)})


def set_task_ids(db: Connection, *, ls_project: LsProject, task_ids: dict[int, int]) -> None:
    """Store Label Studio's task id of each ls_task id.

    Label Studio on SQLite gives the ids of deleted tasks to new tasks. When another asset has such an id stored, its
    task no longer exists, so its row is deleted.
    """
    values = {**ls_project.values(), "ids": list(task_ids), "task_ids": list(task_ids.values())}
    db.execute(
        text(
            """DELETE FROM ls_task WHERE server = :server AND project_id = :project_id AND task_id = ANY(:task_ids)
               AND id <> ALL(:ids)"""
        ),
        values,
    )
    # In two steps, because two of these rows may exchange their ids. When another task had changed says nothing here.
    db.execute(text("UPDATE ls_task SET task_id = NULL, changed_at = NULL WHERE id = ANY(:ids)"), values)
    db.execute(
        text(
            """UPDATE ls_task SET task_id = n.task_id
               FROM unnest(CAST(:ids AS bigint[]), CAST(:task_ids AS bigint[])) AS n (id, task_id)
               WHERE ls_task.id = n.id"""
        ),
        values,
    )


def mark_refused(db: Connection, *, model_version: str, errors: dict[int, str]) -> None:
    """Store why the server refused the predictions of these ls_task ids."""
    db.execute(
        text(
            """UPDATE ls_prediction SET state = 'refused', error = r.error
               FROM unnest(CAST(:ids AS bigint[]), CAST(:errors AS text[])) AS r (id, error)
               WHERE ls_task_id = r.id AND model_version = :version"""
        ),
        {"version": model_version, "ids": list(errors), "errors": list(errors.values())},
    )


def forget_predictions(db: Connection, *, model_version: str, ls_task_ids: Sequence[int]) -> None:
    """Delete the rows of predictions that the server does not have, so that they are sent again."""
    statement = "DELETE FROM ls_prediction WHERE model_version = :version AND ls_task_id = ANY(:ids)"
    db.execute(text(statement), {"version": model_version, "ids": list(ls_task_ids)})


def forget_tasks(db: Connection, *, ls_task_ids: Sequence[int]) -> None:
    """Delete the rows of tasks that the server does not have, with their predictions of every version."""
    db.execute(text("DELETE FROM ls_task WHERE id = ANY(:ids)"), {"ids": list(ls_task_ids)})


def forget_refused(db: Connection, *, ls_project: LsProject, job_id: int) -> int:
    """Let the assets that the project refused be tried again. Returns how many."""
    statement = text(
        """DELETE FROM ls_prediction p USING ls_task t
           WHERE t.id = p.ls_task_id AND t.server = :server AND t.project_id = :project_id
             AND p.job_id = :job_id AND p.state = 'refused'"""
    )
    return db.execute(statement, {**ls_project.values(), "job_id": job_id}).rowcount


def _row(row: RowMapping) -> Row:
    return Row(**{**row, "state": None if row["state"] is None else LsState(row["state"])})
