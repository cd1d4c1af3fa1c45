"""What people see of jobs in a terminal: progress bars, tables, one job's page. Everything here only reads."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection, Engine

from db import jobs as queries
from db.jobs import Counts, FailedAsset, Job
from db.publishing import Published
from db.tables import JobState, PromptMatch

if TYPE_CHECKING:  # they bring OpenCV, which most commands need not wait for
    from orchestrator.label_studio.publish import Report
    from orchestrator.label_studio.review import Numbers, Review

OVER = (JobState.DONE, JobState.CANCELLED, JobState.FAILED)
_REFUSED_SHOWN = 20
_NAMED = 5
_PLAIN_LINE_SECONDS = 10.0  # between lines where nobody watches a terminal


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "-/s", style="cyan")


def follow_job(
    engine: Engine, job_id: int, *, console: Console, refresh_seconds: float, check: Callable[[], None] | None = None
) -> Job:
    """Show a bar until the job is over; returns it. `check` is called at each look and may raise.

    A count takes longer on a large job, so looks are spaced by at least ten times what one took.
    """
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    shown_at = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"job {job_id}", total=None, note="")
        while True:
            if check is not None:
                check()
            started = time.monotonic()
            job, counts = read_job(engine, job_id)
            total = counts.listed if job.listed_at else None
            progress.update(bar, completed=counts.labeled + counts.failed, total=total, note=_note(job, counts))
            if job.state in OVER:
                return job
            if not console.is_terminal and started - shown_at > _PLAIN_LINE_SECONDS:
                shown_at = started
                console.print(one_line(job, counts), highlight=False)
            time.sleep(max(refresh_seconds, 10 * (time.monotonic() - started)))


def read_job(engine: Engine, job_id: int) -> tuple[Job, Counts]:
    """A job with its counts. Raises LookupError for an unknown id."""
    with engine.begin() as db:
        job = queries.get_job(db, job_id=job_id)
        if job is None:
            raise LookupError(f"there is no job {job_id}: `maskfleet jobs` lists them")
        return job, queries.count_job(db, job_id=job_id)


def one_line(job: Job, counts: Counts) -> str:
    """A job in a line, for logs."""
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
    for name in ("job", "state", "listed", "labeled", "failed", "pending", "masks", "model", "source"):
        table.add_column(
            name, justify="right" if name in ("listed", "labeled", "failed", "pending", "masks") else "left"
        )
    for job, counts in jobs:
        numbers = (counts.listed, counts.labeled, counts.failed, counts.pending, counts.masks)
        source = Text(job.source, overflow="ellipsis", no_wrap=True)
        table.add_row(str(job.id), job.state, *(f"{n:,}" for n in numbers), job.model, source)
    return table


def print_job(
    console: Console,
    job: Job,
    counts: Counts,
    failed: Sequence[FailedAsset],
    published: Sequence[Published] = (),
    prompts: dict[str, Any] | None = None,
    detector: dict[str, Any] | None = None,
    phrases: list[dict[str, Any]] | None = None,
    busy: float | None = None,
) -> None:
    """One job's page: how far it is, what was left out, what went wrong, and what to do about it.

    prompts: what `prompts_report` gives. detector: what `detector_report` gives. phrases: what `text_report`
    gives. busy: what `queries.busy_share` gives.
    """
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "job": f"{job.id} {job.name}",
        "state": job.state,
        "source": job.source,
        "model": job.model_version,
        "assets": f"{counts.listed:,} listed = {counts.labeled:,} labeled + {counts.failed:,} failed + "
        f"{counts.pending:,} pending ({counts.running:,} running)",
        "masks": f"{counts.masks:,}",
        "model at work": "" if busy is None else f"{busy:.0%} of its workers' time",
        "answered from stored": f"{counts.reused:,}" if counts.reused else "",
        "skipped": ", ".join(f"{n:,} {reason}" for reason, n in sorted(job.skipped.items())),
        "failed": ", ".join(f"{n:,} {kind}" for kind, n in counts.failed_by_kind.items()),
        "error": job.error or "",
        "without prompts": f"{counts.without_prompts:,} of the labeled; not looked at"
        if counts.without_prompts
        else "",
        **(prompt_rows(prompts) if prompts else {}),
        **(detector_rows(detector) if detector else {}),
        **(text_rows(phrases) if phrases else {}),
        **{f"published to {p.project_id}": _published(p) for p in published},
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(printable(value)))
    console.print(table)
    if failed:
        console.print(failed_table(failed))
    for line in _what_to_do(job, counts, shown_failed=bool(failed)):
        console.print(line, style="dim", highlight=False)


def report_as_json(job: Job, server: str, project_id: int, report: Report) -> dict[str, Any]:
    """What `publish --json` prints of a job: of its last pass, with --follow."""
    found = dataclasses.asdict(report)
    found["refused"] = [{"uri": uri, "error": error} for uri, error in report.refused]
    head = {"job": job.id, "model_version": job.model_version, "server": server, "project": project_id}
    return {**head, **found}


def print_report(console: Console, job: Job, report: Report) -> None:
    """What one pass over a job did, and what the project could not take."""
    counts = {
        "published": report.created,
        "added to tasks that were there": report.attached,
        "found there": report.adopted,
        "there before": report.already,
        "put back": report.repaired,
        "duplicates removed": report.duplicates_removed,
        "refused": len(report.refused),
    }
    what = ", ".join(f"{n:,} {name}" for name, n in counts.items() if n) or "nothing to publish"
    console.print(f"job {job.id}: {what}; the project shows {report.shown_version or 'no version'}")
    for uri, error in report.refused[:_REFUSED_SHOWN]:
        console.print(f"refused {printable(uri)}: {printable(error)}", style="red", markup=False)
    if len(report.refused) > _REFUSED_SHOWN:
        console.print(f"and {len(report.refused) - _REFUSED_SHOWN:,} more; --json lists all")
    for note in report.notes:
        console.print(note, style="yellow", markup=False)


def print_review(console: Console, review: Review) -> None:
    """What people made of a job: assets, time, masks by label, score and version."""
    assets, masks = review.assets, review.masks
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    judged = assets.untouched + assets.corrected
    rows = {
        "assets": f"{assets.published:,} published = {assets.untouched:,} accepted untouched + "
        f"{assets.corrected:,} corrected + {assets.elsewhere:,} not begun from this version + "
        f"{assets.skipped:,} skipped + {assets.waiting:,} waiting",
        "untouched": f"{assets.untouched / judged:.1%} of the judged assets" if judged else "",
        "several annotators": f"{assets.several_annotators:,} assets" if assets.several_annotators else "",
        "unread": f"{assets.unread_regions:,} regions that are no masks, or damaged" if assets.unread_regions else "",
        "time a task": f"{review.seconds_mean:.1f} s on average, {review.seconds_median:.1f} s median"
        if review.seconds_mean is not None and review.seconds_median is not None
        else "",
        "score": f"at least {review.accepted.share:.0%} of the {review.accepted.predictions:,} predictions with "
        f"{review.accepted.score:.4f} or more were kept untouched"
        if review.accepted
        else "",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    console.print(table)
    versions = {name or "no prediction of ours": numbers for name, numbers in review.by_version.items()}
    bands = {f"{b / 20:.2f} to {(b + 1) / 20:.2f}": review.by_band[b] for b in sorted(review.by_band, reverse=True)}
    console.print(_numbers_table("masks", {"all": masks}))
    for first, found in (("label", review.by_label), ("score", bands), ("model version", versions)):
        if found:
            console.print(_numbers_table(first, found))


def _numbers_table(first: str, rows: Mapping[str, Numbers]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in ("predicted", "kept", "edited", "relabelled", "deleted", "added", "IoU of edited"):
        table.add_column(name, justify="right")
    for name, n in rows.items():
        counts = (n.predicted, n.kept, n.edited, n.relabelled, n.deleted, n.added)
        iou = "-" if n.mean_iou is None else f"{n.mean_iou:.3f}"
        table.add_row(Text(printable(name)), *(f"{count:,}" for count in counts), iou)
    return table


def _published(found: Published) -> str:
    """How much of a job one project has, and how well its regions show the masks."""
    parts = [f"{found.assets:,} assets at {found.server}"]
    if found.iou_mean is not None and found.iou_worst is not None:
        parts.append(f"IoU of regions with masks {found.iou_mean:.4f}, worst {found.iou_worst:.4f}")
    parts += [f"{found.masks_left_out:,} masks not shown"] if found.masks_left_out else []
    parts += [f"{found.refused:,} refused"] if found.refused else []
    parts += [f"{found.sending:,} under way"] if found.sending else []
    return "; ".join(parts)


def prompts_report(db: Connection, job: Job) -> dict[str, Any] | None:
    """What became of a job's prompt file; None for a job without one.

    unmatched: keys that no asset of the job has, known once its source is listed. unused: labeled assets of which some
    prompts could not be used. Of both the first few are named.
    """
    asked: dict[str, Any] | None = job.asked.get("prompts")
    if asked is None:
        return None
    unmatched, keys = None, list[str]()
    if job.listed_at is not None:
        match = PromptMatch(asked["match"])
        unmatched, keys = queries.unmatched_prompts(db, job_id=job.id, match=match, limit=_NAMED)
    unused, assets = queries.assets_with_unused_prompts(db, job_id=job.id, limit=_NAMED)
    return {
        **asked,
        "unmatched": unmatched,
        "unmatched_first": keys,
        "unused": unused,
        "unused_first": [{"key": key, "error": error} for key, error in assets],
    }


def prompt_rows(report: dict[str, Any]) -> dict[str, str]:
    """The lines of a job's page about its prompts; empty where there is nothing to say."""
    named = ", ".join(report["unmatched_first"])
    more = ", …" if (report["unmatched"] or 0) > len(report["unmatched_first"]) else ""
    unused = "".join(f"{first['key']}: {first['error']}" for first in report["unused_first"][:1])
    return {
        "prompts": f"{report['prompts']:,} of {report['file']} ({report['format']})",
        "unreadable prompts": f"{report['bad']:,}, first {report['bad_first'][0]}" if report["bad"] else "",
        "keys not in the job": f"{report['unmatched']:,}: {named}{more}" if report["unmatched"] else "",
        "with unused prompts": f"{report['unused']:,}, first {unused}" if report["unused"] else "",
    }


def detector_report(db: Connection, job: Job) -> dict[str, Any] | None:
    """What a job's detector found so far; None for a job without one.

    found: class or phrase -> masks. unmapped: those of them that the label map does not name, which keep their
    own names as labels. unused: assets with boxes that could not be used, of which the first few are named.
    """
    asked: dict[str, Any] | None = job.asked.get("detector")
    if asked is None:
        return None
    found = queries.classes_of(db, job_id=job.id)
    mapped = asked["label_map"]
    unused, assets = queries.assets_with_unused_prompts(db, job_id=job.id, limit=_NAMED)
    return {
        **asked,
        "found": found,
        "unmapped": {} if mapped is None else {name: n for name, n in found.items() if name not in mapped},
        "unused": unused,
        "unused_first": [{"key": key, "error": error} for key, error in assets],
    }


def detector_rows(report: dict[str, Any]) -> dict[str, str]:
    """The lines of a job's page about its detector; empty where there is nothing to say."""
    unused = "".join(f"{first['key']}: {first['error']}" for first in report["unused_first"][:1])
    unmapped = _classes(report["unmapped"])
    return {
        "detector": f"{report['name']} ({report['kind']}, {report['identity'][:15]}), scores above "
        f"{report['threshold']:g}",
        "detected": _classes(report["found"]),
        "not in the label map": f"{unmapped}; kept under their own names" if unmapped else "",
        "with unusable boxes": f"{report['unused']:,}, first {unused}" if report["unused"] else "",
    }


def _classes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())


def text_report(db: Connection, job: Job) -> list[dict[str, Any]] | None:
    """A job's phrases with their labels and how many masks each has so far, none included; None for a job without."""
    asked: list[dict[str, Any]] | None = job.asked.get("text")
    if asked is None:
        return None
    found = queries.classes_of(db, job_id=job.id)
    return [{**phrase, "masks": found.get(phrase["text"], 0)} for phrase in asked]


def text_rows(report: list[dict[str, Any]]) -> dict[str, str]:
    """The line of a job's page about its phrases."""
    named = (f"{p['masks']:,} {p['text']}{'' if p['label'] == p['text'] else ' as ' + p['label']}" for p in report)
    return {"text": ", ".join(named)}


def failed_table(failed: Sequence[FailedAsset]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("failed asset", "kind", "why"):
        table.add_column(name, overflow="fold")
    for asset in failed:
        table.add_row(Text(printable(asset.key)), asset.error_kind, Text(printable(asset.error)))
    return table


def printable(text: str) -> str:
    """A key or message without what a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _note(job: Job, counts: Counts) -> str:
    parts = ["listing"] if job.state is JobState.LISTING else []
    parts += [f"{counts.masks:,} masks"]
    parts += [f"[red]{counts.failed:,} failed[/red]"] if counts.failed else []
    return ", ".join(parts)


def _what_to_do(job: Job, counts: Counts, *, shown_failed: bool) -> list[str]:
    lines = []
    if counts.failed and not shown_failed:
        lines.append(f"maskfleet show {job.id} --failed    lists the failed assets with their reasons")
    if counts.failed and job.state is JobState.DONE:
        lines.append(f"maskfleet retry {job.id}    tries the failed assets again")
    if job.state in (JobState.CANCELLED, JobState.FAILED):
        lines.append(f"maskfleet resume {job.id}    goes on where it stopped")
    return lines


def stderr_console() -> Console:
    """Where progress and logs go: stdout is for results."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
