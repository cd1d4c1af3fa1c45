"""The first page: all jobs with their progress, and the processes that serve them."""

from __future__ import annotations

from db import jobs, metrics, processes, progress
from db.jobs import Counts, Job
from db.processes import Process
from db.session import Connection
from db.states import JobState, ProcessKind
from orchestrator.pages.page import counted, safe_text, share_bar, tile
from orchestrator.terminal.progress import duration, speed

_NEWEST = 50


def jobs_list(db: Connection) -> str:
    """The newest jobs."""
    newest = jobs.list_jobs(db, limit=_NEWEST)
    if not newest:
        return '<p class="empty">No job yet. <code>maskfleet submit</code> makes one.</p>'
    counts = jobs.count_jobs(db, job_ids=[job.id for job in newest])
    rows = [_row(db, job, counts[job.id]) for job in newest if job.id in counts]
    return f'<ul class="jobs">{"".join(rows)}</ul>'


def _row(db: Connection, job: Job, counts: Counts) -> str:
    return (
        f'<li class="sheet job"><a href="/jobs/{job.id}"><span class="job-name"><bdi>{job_name(job)}</bdi></span></a>'
        f'{chip(job.state)}<p class="job-source"><span>#{job.id}</span> <span>{safe_text(job.model)}</span> '
        f'<bdi class="key">{safe_text(job.source)}</bdi></p>{job_bar(counts)}'
        f'<p class="job-numbers">{_numbers(db, job, counts)}</p></li>'
    )


def _numbers(db: Connection, job: Job, counts: Counts) -> str:
    parts = [f"<b>{counts.labeled:,}</b> of {counts.listed:,} labeled"]
    parts += [f'<b class="bad">{counts.failed:,}</b> failed'] if counts.failed else []
    parts.append(counted(counts.masks, "mask"))
    if job.state in (JobState.LISTING, JobState.RUNNING):
        rate = progress.assets_per_second(db, job_id=job.id)
        parts += [speed(rate)] if rate else ["no rate yet"]
        if rate and job.state is JobState.RUNNING and counts.pending:
            parts.append(f"about {duration(round(counts.pending / rate))} left")
    elif job.finished_at is not None:
        parts.append(f"in {duration((job.finished_at - job.created_at).total_seconds())}")
    if job.error:
        parts.append(f'<span class="bad">{safe_text(job.error[:200])}</span>')
    return "".join(f"<span>{part}</span>" for part in parts)


def summary(db: Connection) -> str:
    """The deployment in numbers."""
    live = processes.live(db)
    workers = [process for process in live if process.kind is ProcessKind.WORKER]
    states = {state: int(number) for (state,), number in metrics.jobs_by_state(db)}
    at_work = states.get(JobState.RUNNING, 0) + states.get(JobState.LISTING, 0)
    tiles = [
        tile("jobs at work", f"{at_work:,}"),
        tile("workers", f"{len(workers):,}", "" if workers or not at_work else "bad"),
    ]
    if dispatchers := sum(process.kind is ProcessKind.DISPATCHER for process in live):
        tiles.append(tile("dispatchers", f"{dispatchers:,}"))
    paused = states.get(JobState.PAUSED, 0) + states.get(JobState.FAILED, 0)
    tiles += [tile("jobs that need a person", f"{paused:,}", "bad")] if paused else []
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def fleet(db: Connection) -> str:
    """Who serves the deployment now."""
    live = processes.live(db)
    if not live:
        return '<p class="quiet">No process of this deployment is running.</p>'
    return f'<ul class="rows">{"".join(map(_process, live))}</ul>'


def _process(process: Process) -> str:
    about = [process.host, *([process.device] if process.device else []), *([process.model] if process.model else [])]
    trouble = f'<span class="bad">{safe_text(process.trouble)}</span>' if process.trouble else ""
    return (
        f'<li><span class="chip">{process.kind}</span><b><bdi>{safe_text(process.name)}</bdi></b>'
        f'<span class="quiet">{safe_text(" · ".join(about))}</span>{trouble}</li>'
    )


def job_name(job: Job) -> str:
    return safe_text(job.name or f"job {job.id}")


def chip(state: JobState) -> str:
    return f'<span class="chip {state}">{state}</span>'


def job_bar(counts: Counts) -> str:
    return share_bar({"": counts.labeled, "bad": counts.failed}, counts.listed)
