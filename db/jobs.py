"""SQL of jobs: stored, counted, cancelled, resumed, finished.

In every module of this folder a function takes an open connection, never commits, and returns frozen values or counts.
Claims, leases and records are single conditional UPDATEs. So a message that comes twice, a second dispatcher, or a
worker that wakes up too late changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, text

from db.queue import USUAL_PRIORITY, unsend_job
from db.states import JobState

LIST_PATIENCE_SECONDS = 3600.0
LONGEST_LIST_PAUSE_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A row of `job`."""

    id: int
    name: str
    state: JobState
    source: str
    model: str
    model_version: str
    asked: dict[str, Any]
    fresh: bool
    list_cursor: str | None
    list_failures: int
    asset_count: int
    priority: int
    matched: dict[str, Any] | None
    skipped: dict[str, int]
    error: str | None
    created_at: datetime
    listed_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def from_row(cls, row: RowMapping) -> Job:
        return cls(**{**row, "state": JobState(row["state"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How far a job is. Always true: listed = labeled + failed + pending. Running assets count as pending too.

    without_prompts: assets of a job with prompts that no prompt names. They are labeled with no masks, and their image
    is not read. changed: assets whose bytes were not those of the listing when they were read.
    """

    listed: int
    labeled: int
    failed: int
    running: int
    masks: int
    failed_by_kind: dict[str, int]
    reused: int
    without_prompts: int
    changed: int = 0

    @property
    def pending(self) -> int:
        return self.listed - self.labeled - self.failed


JOB_COLUMNS = """id, name, state, source, model, model_version, asked, fresh, list_cursor, list_failures, asset_count,
          priority, matched, skipped, error, created_at, listed_at, finished_at"""


def insert_job(
    db: Connection,
    *,
    name: str,
    source: str,
    model: str,
    model_version: str,
    asked: Mapping[str, Any],
    fresh: bool,
    priority: int = USUAL_PRIORITY,
) -> Job:
    """Store a new job. Its listing begins when a dispatcher sees it."""
    statement = text(
        f"""INSERT INTO job (name, source, model, model_version, asked, fresh, priority)
            VALUES (:name, :source, :model, :model_version, CAST(:asked AS jsonb), :fresh, :priority)
            RETURNING {JOB_COLUMNS}"""
    )
    values: dict[str, Any] = {"name": name, "source": source, "model": model, "model_version": model_version}
    values |= {"fresh": fresh, "priority": priority}
    return Job.from_row(db.execute(statement, {**values, "asked": json.dumps(dict(asked))}).mappings().one())


def get_job(db: Connection, *, job_id: int) -> Job | None:
    """None when there is no such job, or when it is being deleted."""
    row = (
        db.execute(text(f"SELECT {JOB_COLUMNS} FROM job WHERE id = :job_id AND deleted_at IS NULL"), {"job_id": job_id})
        .mappings()
        .one_or_none()
    )
    return Job.from_row(row) if row else None


def list_jobs(db: Connection, *, limit: int) -> list[Job]:
    """The newest jobs first."""
    statement = text(f"SELECT {JOB_COLUMNS} FROM job WHERE deleted_at IS NULL ORDER BY id DESC LIMIT :limit")
    return [Job.from_row(row) for row in db.execute(statement, {"limit": limit}).mappings()]


def jobs_since(db: Connection, *, moment: datetime) -> list[Job]:
    """The jobs made at this moment or later, oldest first."""
    statement = text(f"SELECT {JOB_COLUMNS} FROM job WHERE created_at >= :moment AND deleted_at IS NULL ORDER BY id")
    return [Job.from_row(row) for row in db.execute(statement, {"moment": moment}).mappings()]


def find_unfinished_job(
    db: Connection, *, source: str, model_version: str, asked: Mapping[str, Any], fresh: bool
) -> Job | None:
    """The newest job with exactly this request that is not done."""
    statement = text(
        f"""SELECT {JOB_COLUMNS} FROM job WHERE source = :source AND model_version = :model_version AND fresh = :fresh
            AND asked = CAST(:asked AS jsonb) AND state <> 'done' AND deleted_at IS NULL
            ORDER BY id DESC LIMIT 1"""
    )
    values = {"source": source, "model_version": model_version, "asked": json.dumps(dict(asked)), "fresh": fresh}
    row = db.execute(statement, values).mappings().one_or_none()
    return Job.from_row(row) if row else None


def count_job(db: Connection, *, job_id: int) -> Counts:
    """A job's counts, exactly and in one snapshot. It reads counters, so it costs the same for jobs of every size."""
    return count_jobs(db, job_ids=[job_id])[job_id]


def count_jobs(db: Connection, *, job_ids: Sequence[int]) -> dict[int, Counts]:
    """The counts of these jobs, all in one snapshot. Unknown jobs are left out."""
    rows = db.execute(
        text(
            """SELECT j.id, j.asset_count AS listed, c.*,
                      (SELECT coalesce(sum(cardinality(in_flight)), 0)::bigint FROM chunk
                       WHERE state = 'running' AND job_id = j.id) AS running
               FROM job j CROSS JOIN LATERAL (
                   SELECT coalesce(sum(assets) FILTER (WHERE error_kind = ''), 0)::bigint AS labeled,
                          coalesce(sum(assets) FILTER (WHERE error_kind <> ''), 0)::bigint AS failed,
                          coalesce(sum(masks), 0)::bigint AS masks, coalesce(sum(reused), 0)::bigint AS reused,
                          coalesce(sum(without_size) FILTER (WHERE error_kind = ''), 0)::bigint AS without_prompts,
                          coalesce(sum(changed), 0)::bigint AS changed,
                          coalesce(jsonb_agg(jsonb_build_array(error_kind, assets))
                                   FILTER (WHERE error_kind <> ''), '[]') AS failures
                   FROM outcome_counter WHERE job_id = j.id) c
               WHERE j.id = ANY(:ids)"""
        ),
        {"ids": list(job_ids)},
    ).mappings()
    return {row["id"]: _counts({**row}) for row in rows}


def _counts(row: dict[str, Any]) -> Counts:
    del row["id"]
    by_kind: dict[str, int] = {}
    for kind, assets in row.pop("failures"):
        by_kind[kind] = by_kind.get(kind, 0) + assets
    return Counts(**row, failed_by_kind={kind: assets for kind, assets in sorted(by_kind.items()) if assets})


def model_busy_fraction(db: Connection, *, job_id: int) -> float | None:
    """The part 0..1 of the workers' time in which the model was at work.

    A worker's time counts from its first stored batch to its last. Pauses between two runs of a job count as idle; what
    was retried counts too. None when no worker stored two batches.
    """
    statement = text(
        """SELECT sum(total_ms - first_ms) / 1000.0 / nullif(sum(extract(epoch FROM last_at - first_at)), 0)
           FROM worker_time WHERE job_id = :job_id"""
    )
    share = db.execute(statement, {"job_id": job_id}).scalar_one()
    return None if share is None else min(float(share), 1.0)


def cancel_job(db: Connection, *, job_id: int) -> bool:
    """Stop a job. A worker releases its running chunk at its next write. False if the job was already over.

    Its sent chunks become new again: their messages will find nothing to do, and the window is free for other jobs.
    """
    statement = "UPDATE job SET state = 'cancelled' WHERE id = :job_id AND state IN ('listing', 'running')"
    stopped = db.execute(text(statement), {"job_id": job_id}).rowcount == 1
    unsend_job(db, job_id=job_id)
    return stopped


def resume_job(db: Connection, *, job_id: int) -> bool:
    """Let a cancelled, paused or failed job continue where it stopped. False if it was none of these."""
    statement = text(
        """UPDATE job SET state = CASE WHEN listed_at IS NULL THEN 'listing' ELSE 'running' END,
                  error = NULL, list_failures = 0, list_failing_since = NULL, list_retry_at = NULL, finished_at = NULL
           WHERE id = :job_id AND state IN ('cancelled', 'failed', 'paused') AND deleted_at IS NULL"""
    )
    resumed = db.execute(statement, {"job_id": job_id}).rowcount == 1
    if resumed:
        unsend_job(db, job_id=job_id)
    return resumed


# A job's failed outcomes (of one kind, or all), each with its chunk: o, c.
_FAILED = """outcome o CROSS JOIN LATERAL (
                 SELECT id, last_asset_id FROM chunk WHERE job_id = :job_id AND first_asset_id <= o.asset_id
                 ORDER BY first_asset_id DESC LIMIT 1) c
             WHERE o.job_id = :job_id AND o.error_kind IS NOT NULL AND c.last_asset_id >= o.asset_id
               AND (CAST(:kind AS text) IS NULL OR o.error_kind = :kind)"""


def retry_failed(db: Connection, *, job_id: int, error_kind: str | None) -> int:
    """Delete the failed outcomes of a job (of one kind, or all), so that those assets run again. Returns how many."""
    db.execute(text("SET LOCAL statement_timeout = 0"))  # some millions take longer than any other statement may
    values: dict[str, Any] = {"job_id": job_id, "kind": error_kind}
    # The chunks first, as workers lock them: in another order two could wait for each other. A worker that holds a
    # chunk would not read these assets again. The new token makes it lose the chunk.
    reset = text(
        f"""UPDATE chunk SET state = 'new', token = token + 1, in_flight = '{{}}', lease_until = NULL,
                   transient_failures = 0, ready_at = NULL, labeled = NULL, failed = NULL, masks = NULL
            WHERE id = ANY(ARRAY(SELECT c.id FROM {_FAILED})) RETURNING id"""
    )
    values["chunks"] = list(db.execute(reset, values).scalars())
    # Only of these chunks: what failed in another one meanwhile would be left behind.
    forget = text(
        f"""DELETE FROM outcome WHERE asset_id = ANY(ARRAY(
                SELECT o.asset_id FROM {_FAILED} AND c.id = ANY(:chunks))) RETURNING asset_id"""
    )
    again = list(db.execute(forget, values).scalars())
    if not again:
        return 0
    db.execute(text("DELETE FROM suspect WHERE asset_id = ANY(:ids)"), {"ids": again})
    db.execute(
        text(
            """UPDATE job SET state = CASE state WHEN 'done' THEN 'running' ELSE state END,
                      finished_at = CASE state WHEN 'done' THEN NULL ELSE finished_at END,
                      -- What was judged and is not retried stays judged: the brake would pause the job for it anew.
                      judged_assets = judged_assets - least(:again, judged_failed),
                      judged_failed = judged_failed - least(:again, judged_failed)
               WHERE id = :job_id AND deleted_at IS NULL"""
        ),
        {"job_id": job_id, "again": len(again)},
    )
    return len(again)


def jobs_to_list(db: Connection) -> list[Job]:
    """Jobs with a listing to go on with, without those that pause after a failure."""
    statement = text(
        f"""SELECT {JOB_COLUMNS} FROM job
            WHERE state = 'listing' AND (list_retry_at IS NULL OR list_retry_at <= now()) ORDER BY id"""
    )
    rows = db.execute(statement).mappings()
    return [Job.from_row(row) for row in rows]


def jobs_to_match(db: Connection) -> list[Job]:
    """Listed jobs with prompts that are not yet matched with their assets."""
    statement = text(
        f"""SELECT {JOB_COLUMNS} FROM job
            WHERE state = 'running' AND asked->>'prompts' IS NOT NULL AND matched IS NULL ORDER BY id"""
    )
    return [Job.from_row(row) for row in db.execute(statement).mappings()]


def record_list_failure(db: Connection, *, job: Job, error: str, lasting: bool) -> None:
    """Store why a listing failed. The job fails at once on a lasting error, and after an hour of temporary ones.

    After a temporary one it is listed again in 1 s, 2 s, 4 s ... (at most 300 s), and its error says so meanwhile. An
    hour in which nobody tried, because no dispatcher ran, does not count.
    """
    db.execute(
        text(
            """UPDATE job SET list_failures = list_failures + 1,
                      list_failing_since = coalesce(pause.since, now()),
                      list_retry_at = now() + make_interval(secs => pause.secs),
                      state = CASE WHEN pause.ends THEN 'failed' ELSE state END,
                      error = :error || CASE WHEN :lasting THEN '' WHEN pause.ends THEN
                          ' (tried ' || list_failures + 1 || ' times in an hour)' ELSE
                          ' (try ' || list_failures + 1 || '; the next is in ' || pause.secs || ' s)' END
               FROM (SELECT least(power(2, least(list_failures, 20)), :longest) AS secs, since,
                            :lasting OR since < now() - make_interval(secs => :patience) AS ends
                     FROM job CROSS JOIN LATERAL (
                         SELECT CASE WHEN list_retry_at > now() - make_interval(secs => :patience)
                                THEN list_failing_since END AS since) AS tried
                     WHERE id = :id) AS pause
               WHERE id = :id AND state = 'listing'"""
        ),
        {
            "id": job.id,
            "error": error,
            "lasting": lasting,
            "longest": LONGEST_LIST_PAUSE_SECONDS,
            "patience": LIST_PATIENCE_SECONDS,
        },
    )


_OVER = """state = 'running' AND (asked->>'prompts' IS NULL OR matched IS NOT NULL)
           AND NOT EXISTS (SELECT 1 FROM chunk WHERE job_id = job.id AND state <> 'done')"""


def finish_jobs(db: Connection) -> list[int]:
    """Mark the fully listed jobs that have no open chunk as done. Returns their ids."""
    # Locked first, and then looked at again: one statement would not see the chunks that a retry opened after it began.
    over = list(db.execute(text(f"SELECT id FROM job WHERE {_OVER} ORDER BY id FOR NO KEY UPDATE")).scalars())
    if not over:
        return []
    finish = f"""UPDATE job SET state = 'done', finished_at = now(), error = NULL
                 WHERE id = ANY(:ids) AND {_OVER} RETURNING id"""
    return list(db.execute(text(finish), {"ids": over}).scalars())


def is_idle(db: Connection) -> bool:
    """True when no job has anything left to list or to run."""
    return not db.execute(text("SELECT EXISTS (SELECT 1 FROM job WHERE state IN ('listing', 'running'))")).scalar_one()


def note_error(db: Connection, *, job_id: int, error: str) -> None:
    """Store the reason why a job cannot continue, for `show`. It is deleted when the job is done."""
    db.execute(
        text("UPDATE job SET error = :error WHERE id = :id AND state IN ('listing', 'running')"),
        {"id": job_id, "error": error},
    )
