"""From the words of a command to a job's row: what is asked is checked before anything is stored."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection

from db import jobs as queries
from db.jobs import Job, NewAsset
from orchestrator.prompts.files import PromptFile
from workers import models
from workers.detectors.detector import AskedDetector
from workers.params import AutomaticParams, automatic_params
from workers.prompts import Prompt, PromptParams
from workers.storage.source import Source

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What one submission asks. include/exclude are globs over keys; `*` also crosses `/`, as in S3 tools."""

    source: str
    model: str
    name: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    limit: int | None = None
    fresh: bool = False
    prompts: PromptFile | None = None
    detector: AskedDetector | None = None
    text: Sequence[Prompt] = ()

    def asked(self) -> dict[str, Any]:
        """What goes on the job's row, JSON-safe."""
        return {
            "mode": self._mode(),
            "prompts": self.prompts.as_json() if self.prompts else None,
            "detector": self.detector.as_json() if self.detector else None,
            "text": [phrase.as_json() for phrase in self.text] or None,
            "params": dict(self.params),
            "label": self.label,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "limit": self.limit,
        }

    def model_version(self) -> str:
        """Changes with whatever changes the masks, and with nothing else."""
        spec = models.find(self.model)
        detector = {"detector": self.detector.what_is_computed()} if self.detector else {}
        if self.text:
            computed = what_text_computes(self.text, self.params)
        elif self.prompts:
            computed = what_prompts_compute(self.prompts.sha256, self.params, self.label)
        elif self.detector:
            computed = {"mode": "detector", "params": _prompt_params(self.params)}
        else:
            computed = what_is_computed(spec, self.params, self.label)
        return models.model_version(spec, computed | detector)

    def _mode(self) -> str:
        if self.text:
            return "text"
        if self.prompts:
            return "prompts"
        return "detector" if self.detector else "automatic"


def what_is_computed(spec: models.ModelSpec, params: Mapping[str, Any], label: str | None) -> dict[str, Any]:
    """Mode, prompts and parameters with the model's defaults filled in, so that naming a default changes nothing."""
    effective = automatic_params(spec.defaults, params)
    values = {name: getattr(effective, name) for name in AutomaticParams.__dataclass_fields__}
    # How many points are decoded at once is a matter of memory, not of masks.
    values.pop("points_per_batch")
    return {"mode": "automatic", "params": _without_usual(values), "label": label}


def what_prompts_compute(sha256: str, params: Mapping[str, Any], label: str | None) -> dict[str, Any]:
    """The same for a job with prompts: equal exactly where the prompts of every asset are."""
    return {"mode": "prompts", "prompts": sha256, "params": _prompt_params(params), "label": label}


def what_text_computes(text: Sequence[Prompt], params: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a job with phrases."""
    return {"mode": "text", "text": [phrase.as_json() for phrase in text], "params": _prompt_params(params)}


def _prompt_params(params: Mapping[str, Any]) -> dict[str, Any]:
    return _without_usual(asdict(PromptParams(**params)))


def _without_usual(values: dict[str, Any]) -> dict[str, Any]:
    """Without the decoder and threshold where they are the usual: what was stored before the choice answers still."""
    usual = {"decoder": "torch", "text_threshold": 0.5}
    return {name: value for name, value in values.items() if (name, value) not in usual.items()}


def submit_job(db: Connection, request: Request) -> Job:
    """Store a job with its prompts; a dispatcher lists its source. Raises what `find` and `automatic_params` raise."""
    job = queries.insert_job(
        db,
        name=request.name or request.source.rstrip("/").rpartition("/")[2],
        source=request.source,
        model=request.model,
        model_version=request.model_version(),
        asked=request.asked(),
        fresh=request.fresh,
    )
    if request.prompts:
        queries.store_prompts(db, job_id=job.id, rows=request.prompts.rows())
    return job


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One listed page after the job's filters. cursor: the last key looked at. complete: nothing follows."""

    assets: list[NewAsset]
    skipped: dict[str, int]
    cursor: str | None
    complete: bool


def select(source: Source, *, asked: Mapping[str, Any], after: str | None, found: int) -> Iterator[Selection]:
    """List a source page by page from a cursor, keeping what the job asked for.

    found: how many assets the job has already, for its limit. What is left out is counted by reason.
    """
    include, exclude, limit = asked.get("include") or [], asked.get("exclude") or [], asked.get("limit")
    for page in source.list(after or ""):
        skipped = {str(reason): n for reason, n in page.skipped.items() if n}
        assets: list[NewAsset] = []
        cursor = page.cursor
        for listed in page.objects:
            reason = _why_not(listed.key, include, exclude)
            if reason:
                skipped[reason] = skipped.get(reason, 0) + 1
                continue
            assets.append(NewAsset(key=listed.key, size_bytes=listed.size_bytes, etag=listed.etag))
            if limit is not None and found + len(assets) >= limit:
                yield Selection(assets=assets, skipped=skipped, cursor=listed.key, complete=True)
                return
        found += len(assets)
        yield Selection(assets=assets, skipped=skipped, cursor=cursor, complete=False)
    yield Selection(assets=[], skipped={}, cursor=None, complete=True)


def _why_not(key: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """The reason to leave a key out, or None. `--include` replaces the rule of image suffixes."""
    if include:
        if not any(fnmatch.fnmatchcase(key, glob) for glob in include):
            return "not_included"
    elif not key.lower().endswith(IMAGE_SUFFIXES):
        return "not_image_suffix"
    if any(fnmatch.fnmatchcase(key, glob) for glob in exclude):
        return "excluded"
    return None
