"""From a command's options to a job's row. The request is checked before anything is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from db import jobs, prompts
from db.jobs import Job
from db.queue import USUAL_PRIORITY
from db.session import Connection
from orchestrator.jobs.version import prompt_params, what_is_computed, what_prompts_compute, what_text_computes
from orchestrator.prompts.files import PromptFile
from workers.classifiers.asked import AskedClassifier
from workers.detectors.detector import AskedDetector
from workers.models.files import model_version
from workers.models.own import identity_of
from workers.models.registry import find_model
from workers.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What one submission asks for. include/exclude are globs over keys; `*` also crosses `/`, as in S3 tools.

    max_failed_fraction: 0..1, of `db.brake`; None is its default.
    keep_embeddings: for how many of its assets; it changes no mask. dedupe: of
    `workers.running.same_bytes`. keys: of `jobs.key_lists`, an absolute path or s3://.
    list_shards: of `jobs.shards`, at least 2. priority: of `db.queue`; it may be changed later.
    """

    source: str
    model: str
    name: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    limit: int | None = None
    fresh: bool = False
    max_failed_fraction: float | None = None
    prompts: PromptFile | None = None
    detector: AskedDetector | None = None
    classify: AskedClassifier | None = None
    text: Sequence[Prompt] = ()
    keep_embeddings: int | Literal["all"] | None = None
    dedupe: Literal["content"] | None = None
    keys: str | None = None
    list_shards: int | None = None
    priority: int = USUAL_PRIORITY

    def asked(self) -> dict[str, Any]:
        """The part that is stored on the job's row, JSON-safe."""
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
            # For a model of one's own, so that a worker with another file of this name refuses the job.
            **({} if (own := identity_of(find_model(self.model))) is None else {"own_model": own}),
            **({} if self.classify is None else {"classify": self.classify.as_json()}),
            # Left out where it was not given, so that `run` finds the unfinished job of an older version.
            **({} if self.max_failed_fraction is None else {"max_failed_fraction": self.max_failed_fraction}),
            # Left out unless it was given: so a job that was stored before this option existed is still the same.
            **({} if self.keep_embeddings is None else {"keep_embeddings": self.keep_embeddings}),
            **({} if self.dedupe is None else {"dedupe": self.dedupe}),
            **({} if self.keys is None else {"keys": self.keys}),
            **({} if self.list_shards is None else {"list_shards": self.list_shards}),
        }

    def model_version(self) -> str:
        """A version that changes when something changes the masks, and only then."""
        spec = find_model(self.model)
        detector = {"detector": self.detector.what_is_computed()} if self.detector else {}
        if self.text:
            computed = what_text_computes(self.text, self.params)
        elif self.prompts:
            computed = what_prompts_compute(self.prompts.sha256, self.params, self.label)
        elif self.detector:
            computed = {"mode": "detector", "params": prompt_params(self.params)}
        else:
            computed = what_is_computed(spec, self.params, self.label)
        classify = {"classify": self.classify.what_is_computed()} if self.classify else {}
        return model_version(spec, computed | detector | classify)

    def _mode(self) -> str:
        if self.text:
            return "text"
        if self.prompts:
            return "prompts"
        return "detector" if self.detector else "automatic"


def submit_job(db: Connection, request: Request) -> Job:
    """Store a job with its prompts; a dispatcher lists its source. Raises what `find` and `automatic_params` raise."""
    job = jobs.insert_job(
        db,
        name=request.name or request.source.rstrip("/").rpartition("/")[2],
        source=request.source,
        model=request.model,
        model_version=request.model_version(),
        asked=request.asked(),
        fresh=request.fresh,
        priority=request.priority,
    )
    if request.prompts:
        prompts.store_prompts(db, job_id=job.id, rows=request.prompts.rows())
    return job
