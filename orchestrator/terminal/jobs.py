"""What people see of jobs in a terminal: progress bars, tables, one job's page. Everything here only reads."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from db import jobs
from db.jobs import Counts, Job
from db.results import FailedAsset
from db.session import DBAPIError, Engine, is_passing
from db.states import JobState
from orchestrator.jobs.reports import JobReport
from orchestrator.terminal.console import printable
from orchestrator.terminal.progress import Bar, bars_on
from orchestrator.terminal.publish import published_rows
from orchestrator.terminal.rows import activity_rows, detector_rows, prompt_rows, text_rows

OVER = (JobState.DONE, JobState.CANCELLED, JobState.FAILED, JobState.PAUSED)
_LONGEST_PAUSE_SECONDS = 30.0


def follow_job(
    engine: Engine,
    job_id: int,
    *,
    console: Console,
    refresh_seconds: float,
    known_rate: float | None = None,
    check: Callable[[], None] | None = None,
) -> Job:
    """Show a bar until the job is over, and return the job. `check` is called before each count and may raise.

    known_rate: assets a second before this call. The pause between two counts is at least ten times as long as a count.
    """
    with bars_on(console) as bars:
        bar, pause = bars.bar(f"job {job_id}", known_rate=known_rate), refresh_seconds
        while True:
            if check is not None:
                check()
            started = time.monotonic()
            try:
                job, counts = read_job(engine, job_id)
            except DBAPIError as error:
                if not is_passing(error):
                    raise
                bar.say("[yellow]Postgres does not answer[/yellow]")
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
                time.sleep(pause)
                continue
            pause = refresh_seconds
            _show(bar, job, counts)
            if job.state in OVER:
                return job
            time.sleep(max(refresh_seconds, 10 * (time.monotonic() - started)))


def _show(bar: Bar, job: Job, counts: Counts) -> None:
    bar.show(
        counts.labeled + counts.failed,
        counts.listed if job.listed_at else None,
        reused=counts.reused + counts.without_prompts,
        is_waiting=counts.running == 0,
        note=_note(job, counts),
        line=one_line(job, counts),
    )


def read_job(engine: Engine, job_id: int) -> tuple[Job, Counts]:
    """A job with its counts. Raises LookupError for an unknown id."""
    with engine.begin() as db:
        job = jobs.get_job(db, job_id=job_id)
        if job is None:
            raise LookupError(f"there is no job {job_id}: `maskfleet jobs` lists them")
        return job, jobs.count_job(db, job_id=job_id)


def one_line(job: Job, counts: Counts) -> str:
    """A job in one line, for logs."""
    return (
        f"job {job.id} {job.state}: {counts.listed} listed = {counts.labeled} labeled + {counts.failed} failed + "
        f"{counts.pending} pending; {counts.masks} masks"
    )


def job_as_json(job: Job, counts: Counts) -> dict[str, Any]:
    """What `--json` prints of a job."""
    assets = dataclasses.asdict(counts)
    masks = assets.pop("masks")
    return {
        "job": job.id,
        "name": job.name,
        "state": job.state,
        "source": job.source,
        "model": job.model,
        "model_version": job.model_version,
        "asked": job.asked,
        "priority": job.priority,
        "assets": {**assets, "pending": counts.pending},
        "masks": masks,
        "skipped": job.skipped,
        "error": job.error,
        "created_at": job.created_at.isoformat(),
        "finished_at": job.finished_at.isoformat() if job.finished_at else None,
    }


def jobs_table(jobs: Sequence[tuple[Job, Counts]]) -> Table:
    """The newest jobs, one a row."""
    table = Table(box=None, pad_edge=False)
    left = ("job", "name", "state", "model", "source")
    for name in (*left[:3], "priority", "listed", "labeled", "failed", "pending", "masks", *left[3:]):
        table.add_column(name, justify="left" if name in left else "right")
    for job, counts in jobs:
        numbers = (job.priority, counts.listed, counts.labeled, counts.failed, counts.pending, counts.masks)
        shown_name, source = (Text(printable(t), overflow="ellipsis", no_wrap=True) for t in (job.name, job.source))
        table.add_row(str(job.id), shown_name, job.state, *(f"{n:,}" for n in numbers), job.model, source)
    return table


def report_as_json(report: JobReport) -> dict[str, Any]:
    """What `show --json` prints."""
    document = job_as_json(report.job, report.counts) | {
        "error": report.error,
        **report.activity.as_json(),
        "prompts": report.prompts,
        "detector": report.detector,
        "text": report.phrases,
        "published": [dataclasses.asdict(project) for project in report.published],
        "model_busy_fraction": report.model_busy_fraction,
        "same_bytes": report.same_bytes,
    }
    if report.failed is not None:
        document["failed"] = [{"key": f.key, "error_kind": f.error_kind, "error": f.error} for f in report.failed]
    return document


def print_job(console: Console, report: JobReport, *, called: str, by_folder: bool) -> None:
    """One job's page: its progress, what was left out, what went wrong, and how to fix it.

    called: the job as the next command is to name it. by_folder: it is the job of a `maskfleet run`.
    """
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")  # a long address goes on in the next line; by default it would be cut
    for name, value in _job_rows(report).items():
        if value:
            table.add_row(name, Text(printable(value)))
    console.print(table)
    if report.failed:
        console.print(failed_table(report.failed))
    for line in _what_to_do(report, called, by_folder=by_folder):
        console.print(printable(line), style="dim", markup=False, highlight=False)


def _job_rows(report: JobReport) -> dict[str, str]:
    """The page's rows. A row with an empty value is left out."""
    job, counts, busy = report.job, report.counts, report.model_busy_fraction
    without = f"{counts.without_prompts:,} of the labeled; not looked at" if counts.without_prompts else ""
    return {
        "job": f"{job.id} {job.name}",
        "state": job.state,
        "priority": f"{job.priority} (of 1 to 9)",
        "source": job.source,
        "model": job.model_version,
        "assets": f"{counts.listed:,} listed = {counts.labeled:,} labeled + {counts.failed:,} failed + "
        f"{counts.pending:,} pending ({counts.running:,} running)",
        "masks": f"{counts.masks:,}",
        "model at work": "" if busy is None else f"{busy:.0%} of its workers' time",
        "answered from stored": f"{counts.reused:,}" if counts.reused else "",
        "same bytes": "" if report.same_bytes is None else f"{report.same_bytes:,} of the labeled; looked at once",
        "skipped": ", ".join(f"{n:,} {reason}" for reason, n in sorted(job.skipped.items())),
        "failed": ", ".join(f"{n:,} {kind}" for kind, n in counts.failed_by_kind.items()),
        "error": report.error or "",
        **activity_rows(report.activity),
        "changed": f"{counts.changed:,} were changed after the listing" if counts.changed else "",
        "without prompts": without,
        **(prompt_rows(report.prompts) if report.prompts else {}),
        **(detector_rows(report.detector) if report.detector else {}),
        **(text_rows(report.phrases) if report.phrases else {}),
        **{f"published to {p.project_id}": published_rows(p) for p in report.published},
    }


def failed_table(failed: Sequence[FailedAsset]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("failed asset", "kind", "why"):
        table.add_column(name, overflow="fold")
    for asset in failed:
        table.add_row(Text(printable(asset.key)), asset.error_kind, Text(printable(asset.error)))
    return table


def _note(job: Job, counts: Counts) -> str:
    parts = [f"listing, {counts.listed:,} found"] if job.state is JobState.LISTING else []
    parts += [f"[yellow]{escape(printable(job.error))}[/yellow]"] if job.error and job.list_failures else []
    parts += [f"{counts.masks:,} masks"]
    parts += [f"[red]{counts.failed:,} failed[/red]"] if counts.failed else []
    return ", ".join(parts)


def _what_to_do(report: JobReport, called: str, *, by_folder: bool) -> list[str]:
    job, counts, lines = report.job, report.counts, []
    if counts.failed and not report.failed:
        lines.append(f"maskfleet show {called} --failed    lists the failed assets with their reasons")
    if counts.failed and job.state in (JobState.DONE, JobState.PAUSED):
        with_what = ", with the same `maskfleet run`" if by_folder else ""
        lines.append(f"maskfleet retry {called}    tries the failed assets again{with_what}")
    if job.state in (JobState.CANCELLED, JobState.FAILED, JobState.PAUSED):
        goes_on = "the same `maskfleet run`" if by_folder else f"maskfleet resume {called}"
        lines.append(f"{goes_on}    goes on where it stopped")
    return lines
