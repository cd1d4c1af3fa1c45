"""The numbers of a review: kept, edited, deleted and added masks, and a score above which most are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from db import review_counts
from db.clicks import ClickTally, click_tallies
from db.jobs import Job
from db.publishing import LsProject
from db.review_counts import Annotator, AssetCounts, Reviewed, Tally
from db.session import Engine

ACCEPTED_SHARE = 0.95
WORST = 10
BANDS = 20
Key = TypeVar("Key")


@dataclass(slots=True, kw_only=True)
class Numbers:
    """Masks by verdict. relabelled: edited masks with another label. mean_iou: of edited masks; None without any."""

    kept: int = 0
    edited: int = 0
    relabelled: int = 0
    deleted: int = 0
    added: int = 0
    measured: int = 0
    iou_sum: float = 0.0

    def add(self, tally: Tally) -> None:
        setattr(self, tally.verdict, getattr(self, tally.verdict) + tally.masks)
        self.relabelled += tally.relabelled
        self.measured += tally.measured
        self.iou_sum += tally.iou_sum

    @property
    def predicted(self) -> int:
        return self.kept + self.edited + self.deleted

    @property
    def mean_iou(self) -> float | None:
        return self.iou_sum / self.measured if self.measured else None

    def as_json(self) -> dict[str, Any]:
        return {
            "predicted": self.predicted,
            "kept": self.kept,
            "edited": self.edited,
            "relabelled": self.relabelled,
            "deleted": self.deleted,
            "added": self.added,
            "mean_iou_edited": None if self.mean_iou is None else round(self.mean_iou, 6),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """At least `share` (0..1) of the judged predictions with this score or more were kept untouched."""

    share: float
    score: float
    predictions: int
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """How people changed a job's masks in a project. Only by_version counts annotations begun from other versions."""

    job: Job
    ls_project: LsProject
    assets: AssetCounts
    masks: Numbers
    by_label: Mapping[str, Numbers]
    by_band: Mapping[int, Numbers]
    by_version: Mapping[str | None, Numbers]
    by_score: Sequence[tuple[float, int, int]]
    accepted: Accepted | None
    annotators: Sequence[Annotator]
    timed_tasks: int
    seconds_total: float
    seconds_mean: float | None
    seconds_median: float | None
    worst: Sequence[Reviewed] = field(default=())
    clicks: Sequence[ClickTally] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return {
            "job": self.job.id,
            "model_version": self.job.model_version,
            "server": self.ls_project.server,
            "project": self.ls_project.project_id,
            "assets": asdict(self.assets),
            "masks": self.masks.as_json(),
            "by_label": {label: numbers.as_json() for label, numbers in self.by_label.items()},
            "by_model_version": [{"model_version": v, **n.as_json()} for v, n in self.by_version.items()],
            "by_score": [
                {"from": band / BANDS, "to": (band + 1) / BANDS, **numbers.as_json()}
                for band, numbers in self.by_band.items()
            ],
            "accepted_untouched": asdict(self.accepted) if self.accepted else None,
            "seconds_a_task": {
                "tasks": self.timed_tasks,
                "total": self.seconds_total,
                "mean": self.seconds_mean,
                "median": self.seconds_median,
            },
            "clicks": [asdict(tally) for tally in self.clicks],
            "annotators": [asdict(person) for person in self.annotators],
            "worst": [asdict(asset) for asset in self.worst],
        }


def read_review(engine: Engine, job: Job, ls_project: LsProject) -> Review:
    """Count what has been read so far."""
    with engine.begin() as db:
        tallies = review_counts.tallies(db, job_id=job.id, ls_project=ls_project)
        by_score = review_counts.kept_by_score(db, job_id=job.id, ls_project=ls_project)
        tasks, total, mean, median = review_counts.lead_seconds(db, job_id=job.id, ls_project=ls_project)
        ours = [tally for tally in tallies if tally.model_version == job.model_version]
        return Review(
            job=job,
            ls_project=ls_project,
            assets=review_counts.asset_counts(db, job_id=job.id, ls_project=ls_project),
            masks=sum_of(tallies, job.model_version),
            by_label=_sum(ours, lambda tally: tally.label),
            by_band=_sum([tally for tally in ours if tally.band is not None], lambda tally: tally.band or 0),
            by_version=_sum(tallies, lambda tally: tally.model_version),
            by_score=by_score,
            accepted=accepted_above(by_score, share=ACCEPTED_SHARE),
            annotators=review_counts.annotators(db, job_id=job.id, ls_project=ls_project),
            timed_tasks=tasks,
            seconds_total=total,
            seconds_mean=mean,
            seconds_median=median,
            worst=review_counts.worst_assets(db, job_id=job.id, ls_project=ls_project, limit=WORST),
            clicks=click_tallies(db, job_id=job.id, ls_project=ls_project),
        )


def sum_of(tallies: Iterable[Tally], model_version: str) -> Numbers:
    """The numbers of all masks whose annotation began from this version."""
    ours = (tally for tally in tallies if tally.model_version == model_version)
    return _sum(ours, lambda _: "all").get("all", Numbers())


def accepted_above(by_score: Sequence[tuple[float, int, int]], *, share: float) -> Accepted | None:
    """The lowest score for which at least `share` of the predictions with it or more were kept. None if there is none.

    by_score: (score, kept, predictions), the highest score first.
    """
    found = None
    kept = predictions = 0
    for score, kept_here, here in by_score:
        kept += kept_here
        predictions += here
        if kept >= share * predictions:
            found = Accepted(share=share, score=score, predictions=predictions, kept=kept)
    return found


def _sum(tallies: Iterable[Tally], key: Callable[[Tally], Key]) -> dict[Key, Numbers]:
    found: dict[Key, Numbers] = {}
    for tally in tallies:
        found.setdefault(key(tally), Numbers()).add(tally)
    return found
