"""summary.json: a run's counts, its failed assets, and how long it took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from db import jobs, results
from db.jobs import Job
from db.session import Connection
from orchestrator.export.files import replacing
from orchestrator.jobs.reports import detector_report, prompts_report, text_report


def write_summary(db: Connection, job: Job, out: Path, seconds: float, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Write the results of a job as one JSON document, and return it.

    seconds: the caller's time for the job. notes: what a reader of the files beside it must know.
    """
    counts = jobs.count_job(db, job_id=job.id)
    failed = results.failed_assets(db, job_id=job.id)
    busy = jobs.model_busy_fraction(db, job_id=job.id)
    summary = {
        "job": job.id,
        "name": job.name,
        "state": str(job.state),
        "source": job.source,
        "model": job.model,
        "model_version": job.model_version,
        "assets": {"listed": counts.listed, "labeled": counts.labeled, "failed": counts.failed},
        "pending": counts.pending,
        "answered_from_stored": counts.reused,
        "without_prompts": counts.without_prompts,
        "changed": counts.changed,
        "prompts": prompts_report(db, job),
        "detector": detector_report(db, job),
        "text": text_report(db, job),
        "skipped": job.skipped,
        "masks": counts.masks,
        "failed_by_kind": counts.failed_by_kind,
        "failed": [{"key": a.key, "error_kind": a.error_kind, "error": a.error} for a in failed],
        "notes": list(notes),
        "seconds": round(seconds, 3),
        "model_busy_fraction": None if busy is None else round(busy, 3),
    }
    with replacing(out) as file:
        json.dump(summary, file, ensure_ascii=False, indent=1)
        file.write("\n")
    return summary
