"""A job's prompts, detector, phrases and workers as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from db.progress import AtWork
from orchestrator.jobs.activity import Activity
from orchestrator.jobs.findings import matching_rows
from orchestrator.terminal.progress import duration, speed


def prompt_rows(report: dict[str, Any]) -> dict[str, str]:
    """The lines of a job's page about its prompts; empty where there is nothing to say."""
    unused = "".join(f"{first['key']}: {first['error']}" for first in report["unused_first"][:1])
    return {
        "prompts": f"{report['prompts']:,} of {report['file']} ({report['format']})",
        "unreadable prompts": f"{report['bad']:,}, first {report['bad_first'][0]}" if report["bad"] else "",
        "other text files": f"{report['passed_over']:,}, first {report['passed_over_first'][0]}; they hold no labels"
        if report.get("passed_over")
        else "",
        **(matching_rows(report) if report["by_rule"] is not None else {}),
        "with unused prompts": f"{report['unused']:,}, first {unused}" if report["unused"] else "",
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


def text_rows(report: list[dict[str, Any]]) -> dict[str, str]:
    """The line of a job's page about its phrases."""
    named = (f"{p['masks']:,} {p['text']}{'' if p['label'] == p['text'] else ' as ' + p['label']}" for p in report)
    return {"text": ", ".join(named)}


def activity_rows(activity: Activity) -> dict[str, str]:
    """Who works at a job, how fast, and the newest error of each kind."""
    chunks = activity.chunks
    is_open = chunks.waiting or chunks.queued or chunks.running
    return {
        "chunks": f"{chunks.waiting:,} waiting, {chunks.queued:,} queued, {chunks.running:,} running"
        if is_open
        else "",
        "speed": _speed(activity),
        **{f"at work: {worker.worker}": _at_work(worker) for worker in activity.workers},
        **{f"last {error.error_kind}": f"{error.key}: {error.error}" for error in activity.last_errors},
        "failed starts": "; ".join(activity.failed_starts),
    }


def _speed(activity: Activity) -> str:
    rate, left = activity.assets_per_second, activity.seconds_left
    if rate is None:
        return ""
    return speed(rate) if left is None else f"{speed(rate)}, about {duration(round(left))} left"


def _at_work(worker: AtWork) -> str:
    """Times are those of the database's clock, so a worker's own clock does not matter."""
    held = "" if worker.held_seconds is None else f", held for {worker.held_seconds:.0f} s"
    lease = f"lease for {worker.lease_seconds:.0f} s more" if worker.lease_seconds > 0 else "lease expired"
    device = f" on {worker.device}" if worker.device else ""
    return f"chunk {worker.chunk_id}{device}, {worker.in_flight} assets in flight{held}, {lease}"
