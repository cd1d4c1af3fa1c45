"""The brake: a job of which too many assets fail is paused, so that it does not use up the night for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from db import progress
from db.progress import Totals
from db.queue import unsend_job

MAX_FAILED_FRACTION = 0.5
MIN_JUDGED_ASSETS = 1000  # a fraction of fewer says little
_NAMED_KINDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    job_id: int
    reason: str


def pause_failing_jobs(db: Connection) -> list[Paused]:
    """Pause the jobs of which too many assets failed. A resumed job is judged by what comes after the pause.

    What a job asked as `max_failed_fraction` counts, else MAX_FAILED_FRACTION. A job without an open chunk is not
    paused, because nothing of it is left to save.
    """
    statement = text(
        """SELECT id, coalesce((asked->>'max_failed_fraction')::float, :fraction) AS fraction,
                  coalesce(judged_assets, 0) AS judged_assets, coalesce(judged_failed, 0) AS judged_failed
           FROM job WHERE state IN ('listing', 'running') AND asset_count >= :least
             AND EXISTS (SELECT 1 FROM chunk WHERE job_id = job.id AND state <> 'done')"""
    )
    rows = db.execute(statement, {"fraction": MAX_FAILED_FRACTION, "least": MIN_JUDGED_ASSETS}).all()
    found = progress.totals(db, job_ids=[row.id for row in rows]) if rows else {}
    paused = []
    for row in rows:
        all_of_it = found[row.id]
        failed = all_of_it.failed - row.judged_failed
        judged = all_of_it.labeled + all_of_it.failed - row.judged_assets
        if judged >= MIN_JUDGED_ASSETS and failed > row.fraction * judged:
            head = f"{failed:,} of {judged:,} assets failed, more than --max-failed-fraction {row.fraction:g}"
            reason = f"{head}: {_commonest(db, job_id=row.id)}. Fix the cause, then resume and retry the job"
            if _pause(db, job_id=row.id, reason=reason, seen=all_of_it):
                paused.append(Paused(job_id=row.id, reason=reason))
    return paused


def _pause(db: Connection, *, job_id: int, reason: str, seen: Totals) -> bool:
    """False if the job stopped meanwhile."""
    values = {"id": job_id, "reason": reason, "assets": seen.labeled + seen.failed, "failed": seen.failed}
    statement = text(
        """UPDATE job SET state = 'paused', error = :reason, judged_assets = :assets, judged_failed = :failed
           WHERE id = :id AND state IN ('listing', 'running')"""
    )
    if db.execute(statement, values).rowcount != 1:
        return False
    unsend_job(db, job_id=job_id)
    return True


def _commonest(db: Connection, *, job_id: int) -> str:
    """The commonest kinds of errors, each with the newest example."""
    statement = text(
        """SELECT error_kind, sum(assets)::bigint AS assets FROM outcome_counter
           WHERE job_id = :id AND error_kind <> ''
           GROUP BY error_kind HAVING sum(assets) > 0 ORDER BY assets DESC, error_kind LIMIT :most"""
    )
    kinds: Sequence[Any] = db.execute(statement, {"id": job_id, "most": _NAMED_KINDS}).all()
    examples: Mapping[str, str] = {e.error_kind: e.error for e in progress.last_errors(db, job_id=job_id)}
    # A retry may have deleted the outcomes since they were counted.
    shown = {row.error_kind: examples.get(row.error_kind, "those that are retried now")[:200] for row in kinds}
    return "; ".join(f"{row.assets:,} {row.error_kind}, such as {shown[row.error_kind]}" for row in kinds)
