"""What `publish` did, as lines and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from db.jobs import Job
from db.published import Published
from orchestrator.label_studio.report import Report
from orchestrator.terminal.console import printable

_REFUSED_SHOWN = 20


def report_as_json(job: Job, server: str, project_id: int, report: Report) -> dict[str, Any]:
    """What `publish --json` prints about a job. With --follow it is about the last pass."""
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
    shown = printable(report.shown_version or "no version")
    console.print(f"job {job.id}: {what}; the project shows {shown}", markup=False)
    for uri, error in report.refused[:_REFUSED_SHOWN]:
        console.print(f"refused {printable(uri)}: {printable(error)}", style="red", markup=False)
    if len(report.refused) > _REFUSED_SHOWN:
        console.print(f"and {len(report.refused) - _REFUSED_SHOWN:,} more; --json lists all")
    for note in report.notes:
        console.print(note, style="yellow", markup=False)


def published_rows(found: Published) -> str:
    """How much of a job a project has, and how well its regions match the masks."""
    parts = [f"{found.assets:,} assets at {found.server}"]
    if found.iou_mean is not None and found.iou_worst is not None:
        parts.append(f"IoU of regions with masks {found.iou_mean:.4f}, worst {found.iou_worst:.4f}")
    parts += [f"{found.masks_left_out:,} masks not shown"] if found.masks_left_out else []
    parts += [f"{found.refused:,} refused"] if found.refused else []
    parts += [f"{found.sending:,} under way"] if found.sending else []
    return "; ".join(parts)
