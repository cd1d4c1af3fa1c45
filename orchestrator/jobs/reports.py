"""What `show` and `run` say of a job's prompts, detector and phrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from db import jobs, prompts, published, results
from db.jobs import Counts, Job
from db.published import Published
from db.results import FailedAsset
from db.session import Connection

_NAMED = 5
_NOT_MATCHED: dict[str, Any] = {"by_rule": None, "unmatched": None, "unmatched_first": []}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """One job as `show` tells it. failed: None where they were not asked for.

    prompts, detector, phrases: what the functions below give. model_busy_fraction: of its workers' time, None before
    the first outcome.
    """

    job: Job
    counts: Counts
    failed: Sequence[FailedAsset] | None
    published: Sequence[Published]
    prompts: dict[str, Any] | None
    detector: dict[str, Any] | None
    phrases: list[dict[str, Any]] | None
    model_busy_fraction: float | None


def read_report(db: Connection, job: Job, counts: Counts, *, with_failed: bool) -> JobReport:
    return JobReport(
        job=job,
        counts=counts,
        failed=results.failed_assets(db, job_id=job.id) if with_failed else None,
        published=published.published(db, job_id=job.id),
        prompts=prompts_report(db, job),
        detector=detector_report(db, job),
        phrases=text_report(db, job),
        model_busy_fraction=jobs.model_busy_fraction(db, job_id=job.id),
    )


def prompts_report(db: Connection, job: Job) -> dict[str, Any] | None:
    """What became of a job's prompt file; None for a job without one.

    by_rule: which rule found how many keys, known once the source is listed, as are unmatched: keys that mean no asset;
    ambiguous: those of them for which something was found, but no one asset; several: keys that mean several assets.
    unused: labeled assets of which some prompts could not be used. Of all the first few are named.
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
    """What a job's detector found so far; None for a job without one.

    found: class or phrase -> masks. unmapped: those of them that the label map does not name, which keep their
    own names as labels. unused: assets with boxes that could not be used, of which the first few are named.
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
    """A job's phrases with their labels and how many masks each has so far, none included; None for a job without."""
    asked: list[dict[str, Any]] | None = job.asked.get("text")
    if asked is None:
        return None
    found = prompts.classes_of(db, job_id=job.id)
    return [{**phrase, "masks": found.get(phrase["text"], 0)} for phrase in asked]
