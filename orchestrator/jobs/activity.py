"""Who works at a job now, how fast, and why it may stand still."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from db import processes, progress
from db.jobs import Counts, Job
from db.processes import Process
from db.progress import AtWork, ChunkCounts, LastError
from db.session import Connection
from db.settings import settings
from db.states import JobState, ProcessKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """A job that is looked at now.

    assets_per_second: over the last ten minutes at most, None when nothing was stored then. seconds_left: at that rate,
    None when it is unknown or the listing goes on. failed_starts: a line a worker that does not come up. obstacles:
    what keeps the job from going on, a line each; empty when it is over or workers are at it.
    """

    workers: Sequence[AtWork]
    chunks: ChunkCounts
    assets_per_second: float | None
    seconds_left: float | None
    last_errors: Sequence[LastError]
    failed_starts: Sequence[str]
    obstacles: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        del document["obstacles"]
        return document


def read_activity(db: Connection, job: Job, counts: Counts) -> Activity:
    is_over = job.state not in (JobState.LISTING, JobState.RUNNING)
    rate = None if is_over else progress.assets_per_second(db, job_id=job.id)
    live = processes.live(db)
    workers = progress.at_work(db, job_id=job.id)
    return Activity(
        workers=workers,
        chunks=progress.count_chunks(db, job_id=job.id),
        assets_per_second=rate,
        seconds_left=counts.pending / rate if rate and job.state is JobState.RUNNING else None,
        last_errors=progress.last_errors(db, job_id=job.id) if counts.failed else [],
        failed_starts=[] if is_over else [process.trouble for process in live if process.trouble],
        obstacles=[] if is_over or workers else _obstacles(live, job),
    )


def _obstacles(live: Sequence[Process], job: Job) -> list[str]:
    kinds = {process.kind for process in live}
    lines = [process.trouble for process in live if process.trouble]
    if ProcessKind.DISPATCHER not in kinds and job.state is JobState.LISTING:
        lines.append("no dispatcher is running to list the source: start `maskfleet dispatch`")
    if ProcessKind.WORKER not in kinds:
        lines.append("no worker is running: start `maskfleet worker`, or for a folder the same `maskfleet run` again")
    elif not lines and (why := why_nobody_can(live, job.model)):
        lines.append(why)
    return lines


def why_nobody_can(live: Sequence[Process], model: str) -> str | None:
    """Why no live worker can run this model now. None when one can."""
    workers = [process for process in live if process.kind is ProcessKind.WORKER]
    if not workers:
        return "no worker is running yet: the job waits for `maskfleet worker`"
    if settings().weights_mirror is not None or any(model in worker.models for worker in workers):
        return None  # with a mirror, a worker takes what it lacks
    has = "; ".join(f"{worker.name} has {', '.join(worker.models) or 'none'}" for worker in workers[:5])
    return (
        f"no live worker has the weights of {model} ({has}): run `maskfleet models pull NAME` where they run, or set "
        "MASKFLEET_WEIGHTS_MIRROR there"
    )
