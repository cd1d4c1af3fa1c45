"""`watch`, `jobs`, `show`, `priority`, `cancel`, `resume`, `retry`: follow and control a job."""

from __future__ import annotations

from typing import Annotated

import typer

from db import jobs, progress, queue
from db.queue import HIGHEST_PRIORITY, LOWEST_PRIORITY
from db.states import JobState
from orchestrator.cli.app import (
    JobArgument,
    JsonOption,
    app,
    called,
    deployment_engine,
    err,
    fail,
    named_by_folder,
    print_json,
)
from orchestrator.cli.options import PRIORITY_HELP
from orchestrator.jobs.findings import matching_rows, nothing_found
from orchestrator.jobs.reports import read_report
from orchestrator.terminal.console import printable, stdout_console
from orchestrator.terminal.jobs import (
    follow_job,
    job_as_json,
    jobs_table,
    one_line,
    print_job,
    read_job,
    report_as_json,
)
from workers.errors import ErrorKind

_MOST_JOBS = 100_000
_THE_SAME_RUN = "the same `maskfleet run`"  # nothing else works on a folder's job


@app.command(epilog="Example: `maskfleet watch 12`")
def watch(
    job: JobArgument,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Follow a job until it is over; exits 1 when assets failed, or when there was nothing to label."""
    engine = deployment_engine()
    if not once:
        with engine.begin() as db:
            rate = progress.assets_per_second(db, job_id=job)
        follow_job(engine, job, console=err, refresh_seconds=1.0, known_rate=rate)
    found, counts = read_job(engine, job)
    if as_json:
        print_json(job_as_json(found, counts))
    else:
        print(one_line(found, counts))
    for what, line in matching_rows(found.matched).items():
        if line:
            err.print(f"{what}: {printable(line)}", style="yellow", markup=False)
    why = nothing_found(found.source, counts.listed, found.skipped, found.matched)
    why = why if found.state is JobState.DONE else None
    if why:
        err.print(f"nothing to do: {printable(why)}", style="red", markup=False)
    if found.state is JobState.DONE and counts.labeled and not once:
        look = printable(f"maskfleet gallery {called(job)} --out look    shows its pictures")
        err.print(look, style="dim", markup=False, highlight=False)
    if found.state is JobState.PAUSED:
        err.print(f"paused: {printable(found.error or '')}", style="red", markup=False)
    if why or counts.failed or found.state in (JobState.FAILED, JobState.PAUSED):
        raise typer.Exit(1)


@app.command("jobs", epilog="Example: `maskfleet jobs --limit 5`")
def list_jobs(
    limit: Annotated[int, typer.Option("--limit", min=1, max=_MOST_JOBS, help="How many of the newest.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List the newest jobs."""
    engine = deployment_engine()
    with engine.begin() as db:
        newest = jobs.list_jobs(db, limit=limit)
        counts = jobs.count_jobs(db, job_ids=[job.id for job in newest])
    found = [(job, counts[job.id]) for job in newest if job.id in counts]
    if as_json:
        print_json([job_as_json(job, counts) for job, counts in found])
    else:
        stdout_console().print(jobs_table(found))


@app.command(epilog="Example: `maskfleet show 12 --failed`")
def show(
    job: JobArgument,
    failed: Annotated[bool, typer.Option("--failed", help="List the failed assets with their reasons.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show one job: its progress, what was skipped, what failed and why."""
    engine = deployment_engine()
    found, counts = read_job(engine, job)
    with engine.begin() as db:
        report = read_report(db, found, counts, with_failed=failed)
    if as_json:
        print_json(report_as_json(report))
    else:
        print_job(stdout_console(), report, called=called(job), by_folder=named_by_folder(job))


@app.command("priority", epilog="Example: `maskfleet priority 12 8`")
def change_priority(
    job: JobArgument,
    priority: Annotated[
        int, typer.Argument(min=LOWEST_PRIORITY, max=HIGHEST_PRIORITY, help=PRIORITY_HELP, show_default=False)
    ],
) -> None:
    """Change a job's priority: its share of the workers from now on."""
    engine = deployment_engine()
    found, _ = read_job(engine, job)
    with engine.begin() as db:
        queue.set_priority(db, job_id=job, priority=priority)
    err.print(f"job {job} has priority {priority} now, before: {found.priority}")


@app.command(epilog="Example: `maskfleet cancel 12`")
def cancel(job: JobArgument) -> None:
    """Stop a job. Its labeled assets stay, and `resume` goes on."""
    engine = deployment_engine()
    with engine.begin() as db:
        done = jobs.cancel_job(db, job_id=job)
    found, _ = read_job(engine, job)
    if not done:
        fail(f"job {job} is {found.state}: only a listing or running job can be cancelled")
    goes_on = _THE_SAME_RUN if named_by_folder(job) else f"maskfleet resume {job}"
    err.print(f"job {job} is cancelled; {goes_on} goes on")


@app.command(epilog="Example: `maskfleet resume 12`")
def resume(job: JobArgument) -> None:
    """Let a cancelled, paused or failed job go on where it stopped."""
    engine = deployment_engine()
    with engine.begin() as db:
        done = jobs.resume_job(db, job_id=job)
    found, _ = read_job(engine, job)
    if not done:
        fail(f"job {job} is {found.state}: only a cancelled, paused or failed job can be resumed")
    if named_by_folder(job):
        err.print(f"job {job} goes on with {_THE_SAME_RUN}")
    else:
        err.print(f"job {job} goes on; maskfleet watch {job} follows it")


@app.command(epilog="Example: `maskfleet retry 12 --kind not_found`")
def retry(
    job: JobArgument,
    kind: Annotated[ErrorKind | None, typer.Option("--kind", help="Only assets that failed for this reason.")] = None,
) -> None:
    """Try a job's failed assets again."""
    engine = deployment_engine()
    read_job(engine, job)
    with engine.begin() as db:
        count = jobs.retry_failed(db, job_id=job, error_kind=kind)
    by_what = f" with {_THE_SAME_RUN}" if named_by_folder(job) else ""
    err.print(f"{count} assets of job {job} run again{by_what}" if count else f"job {job} has no such failed assets")
