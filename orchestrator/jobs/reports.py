"""What `show` and `run` print about a job: its prompts, detector and phrases, and who is at work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from db import jobs, prompts, published, results, same_bytes
from db.jobs import Counts, Job
from db.published import Published
from db.results import FailedAsset
from db.session import Connection
from orchestrator.jobs.activity import Activity, read_activity

_NAMED = 5
_NOT_MATCHED: dict[str, Any] = {"by_rule": None, "unmatched": None, "unmatched_first": []}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """One job as `show` prints it. failed: None if they were not asked for.

    prompts, detector, phrases: the results of the functions below. model_busy_fraction: the fraction 0..1 of its
    workers' time in which the model worked, None before the first outcome. same_bytes: assets that were answered by
    others with the same bytes; None if that was not asked for.
    """

    job: Job
    counts: Counts
    activity: Activity
    failed: Sequence[FailedAsset] | None
    published: Sequence[Published]
    prompts: dict[str, Any] | None
    detector: dict[str, Any] | None
    phrases: list[dict[str, Any]] | None
    model_busy_fraction: float | None
    same_bytes: int | None

    @property
    def error(self) -> str | None:
        """What keeps the job from going on: what is stored on its row, or else what can be seen now."""
        return self.job.error or "; ".join(self.activity.obstacles) or None


def read_report(db: Connection, job: Job, counts: Counts, *, with_failed: bool) -> JobReport:
    return JobReport(
        job=job,
        counts=counts,
        activity=read_activity(db, job, counts),
        failed=results.failed_assets(db, job_id=job.id) if with_failed else None,
        published=published.published(db, job_id=job.id),
        prompts=prompts_report(db, job),
        detector=detector_report(db, job),
        phrases=text_report(db, job),
        model_busy_fraction=jobs.model_busy_fraction(db, job_id=job.id),
        same_bytes=same_bytes.count_same_bytes(db, job_id=job.id) if job.asked.get("dedupe") else None,
    )


def prompts_report(db: Connection, job: Job) -> dict[str, Any] | None:
    """How a job's prompt file was used. None for a job without one.

    by_rule: how many keys each rule found. unmatched: keys that mean no asset. ambiguous: unmatched keys for which
    something was found, but not exactly one asset. several: keys that mean several assets. These four are known when
    the source is listed. unused: labeled assets with prompts that could not be used. The first few of each are named.
    """
    asked: dict[str, Any] | None = job.asked.get("prompts")
    if asked is None:
        return None
    unused, assets = prompts.assets_with_unused_prompts(db, job_id=job.id, limit=_NAMED)
    return {
        **asked,
        **(job.matched or _NOT_MATCHED),
        "unused": unused,
        "unused_first": [{"key": key, "error": error} for key, error in assets],
    }


def detector_report(db: Connection, job: Job) -> dict[str, Any] | None:
    """What a job's detector found so far. None for a job without one.

    found: class or phrase -> masks. unmapped: the found classes that the label map does not name; their own names are
    the labels. unused: assets with boxes that could not be used; the first few are named.
    """
    asked: dict[str, Any] | None = job.asked.get("detector")
    if asked is None:
        return None
    found = prompts.classes_of(db, job_id=job.id)
    mapped = asked["label_map"]
    unused, assets = prompts.assets_with_unused_prompts(db, job_id=job.id, limit=_NAMED)
    return {
        **asked,
        "found": found,
        "unmapped": {} if mapped is None else {name: n for name, n in found.items() if name not in mapped},
        "unused": unused,
        "unused_first": [{"key": key, "error": error} for key, error in assets],
    }


def text_report(db: Connection, job: Job) -> list[dict[str, Any]] | None:
    """A job's phrases, their labels and their mask counts so far, 0 included. None for a job without phrases."""
    asked: list[dict[str, Any]] | None = job.asked.get("text")
    if asked is None:
        return None
    found = prompts.classes_of(db, job_id=job.id)
    return [{**phrase, "masks": found.get(phrase["text"], 0)} for phrase in asked]
