"""What `show` and `run` say of a job's prompts, detector and phrases."""

from __future__ import annotations

from typing import Any

from db import prompts
from db.jobs import Job
from db.session import Connection
from db.states import PromptMatch

_NAMED = 5


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
        unmatched, keys = prompts.unmatched_prompts(db, job_id=job.id, match=match, limit=_NAMED)
    unused, assets = prompts.assets_with_unused_prompts(db, job_id=job.id, limit=_NAMED)
    return {
        **asked,
        "unmatched": unmatched,
        "unmatched_first": keys,
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
