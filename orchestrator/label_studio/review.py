"""What became of a job's predictions in Label Studio: reads annotations, judges them, counts.

What counts, of an asset's task in the project:
- Skipped annotations (was_cancelled), drafts and deleted annotations do not count. An asset that everyone who opened it
  skipped is `skipped`; without any annotation it is `waiting`.
- Of several annotations of one person the one changed last counts. Of several people's the one marked as ground truth,
  else the one changed last, is the asset's: each prediction is judged once. Everyone's time counts.
- An annotation is judged by the prediction it began from. One that began from another version than the job's, or from
  nothing, is `elsewhere`: it appears by its version, and in `export --reviewed`, and in none of the other numbers.
- kept: same pixels, same label. edited: pixels or label (`relabelled`) differ; its IoU is of what Label Studio showed
  with what came back. deleted: no region of the mask is left. added: drawn by a person. `verdicts` has the details.
- untouched: an asset whose predictions are all kept, and nothing added. Masks that were not shown (beyond a task's
  limit of regions) are not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import Engine

from db import annotations as reviewing
from db.annotations import AnnotationRow, Annotator, AssetCounts, KnownTask, Reviewed, Tally
from db.jobs import Job
from db.publishing import Place
from db.tables import Standing
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.verdicts import annotator, base_prediction, choose, compare

ACCEPTED_SHARE = 0.95
WORST = 10
BANDS = 20

_PAGE = 20  # whole tasks: with 150 brush masks one is 2 MB
# A change may be committed after another that carries a later time.
_OVERLAP = timedelta(minutes=1)

Key = TypeVar("Key")


@dataclass(slots=True, kw_only=True)
class Numbers:
    """Masks by verdict. relabelled: the edited ones with another label. mean_iou: of the edited ones, None without."""

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
    """Of the judged predictions with this score or more, at least `share` were kept untouched."""

    share: float
    score: float
    predictions: int
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What people made of a job in one project. All but by_version is of annotations begun from the job's version."""

    job: Job
    place: Place
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

    def as_json(self) -> dict[str, Any]:
        return {
            "job": self.job.id,
            "model_version": self.job.model_version,
            "server": self.place.server,
            "project": self.place.project_id,
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
            "annotators": [asdict(person) for person in self.annotators],
            "worst": [asdict(asset) for asset in self.worst],
        }


def pull(
    engine: Engine, client: LabelStudio, project_id: int, *, progress: Callable[[int], None] = lambda _: None
) -> int:
    """Read what changed in a project since the last time; returns how many tasks.

    A page at a time, so memory does not grow with the project. The order by id, and a filter that no task leaves while
    it is worked on, make sure that a page turned while people work skips nothing. Reading again is harmless.
    """
    place = Place(client.url, project_id)
    client.get_project(project_id)
    last = next(
        iter(client.list_tasks(project_id, include=("id", "updated_at"), ordering=("-tasks:updated_at",), page_size=1)),
        None,
    )
    if last is None:
        return 0
    newest = datetime.fromisoformat(last["updated_at"])
    with engine.begin() as db:
        seen = reviewing.watermark(db, place=place)
    filters = _changed_since(newest) if seen is None else _changed_since(seen - _OVERLAP)[:1]
    count = 0
    page: list[dict[str, Any]] = []
    for task in client.list_tasks(project_id, filters, any_of=True, whole=True, page_size=_PAGE):
        page.append(task)
        if len(page) == _PAGE:
            count += _store(engine, place, page)
            progress(count)
            page = []
    count += _store(engine, place, page)
    with engine.begin() as db:
        reviewing.set_watermark(db, place=place, watermark=newest)
    return count


def read_review(engine: Engine, job: Job, place: Place) -> Review:
    """Count what has been read so far."""
    with engine.begin() as db:
        tallies = reviewing.tallies(db, job_id=job.id, place=place)
        by_score = reviewing.kept_by_score(db, job_id=job.id, place=place)
        tasks, total, mean, median = reviewing.lead_seconds(db, job_id=job.id, place=place)
        ours = [tally for tally in tallies if tally.model_version == job.model_version]
        return Review(
            job=job,
            place=place,
            assets=reviewing.asset_counts(db, job_id=job.id, place=place),
            masks=_sum(ours, lambda _: "all").get("all", Numbers()),
            by_label=_sum(ours, lambda tally: tally.label),
            by_band=_sum([tally for tally in ours if tally.band is not None], lambda tally: tally.band or 0),
            by_version=_sum(tallies, lambda tally: tally.model_version),
            by_score=by_score,
            accepted=accepted_above(by_score, share=ACCEPTED_SHARE),
            annotators=reviewing.annotators(db, job_id=job.id, place=place),
            timed_tasks=tasks,
            seconds_total=total,
            seconds_mean=mean,
            seconds_median=median,
            worst=reviewing.worst_assets(db, job_id=job.id, place=place, limit=WORST),
        )


def accepted_above(by_score: Sequence[tuple[float, int, int]], *, share: float) -> Accepted | None:
    """The lowest score from which on at least `share` of the predictions were kept; None where there is none.

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


def judge_task(task: Mapping[str, Any], known: KnownTask) -> list[AnnotationRow]:
    """A task's annotations as rows, the chosen one compared with the prediction it began from.

    task: as Label Studio tells it, with its annotations and predictions.
    """
    annotations, predictions = task.get("annotations") or [], task.get("predictions") or []
    standings = choose(annotations)
    rows = []
    for annotation in annotations:
        standing = standings[annotation["id"]]
        prediction = base_prediction(annotation, predictions)
        version = prediction["model_version"] if prediction is not None else None
        # A prediction that is not of our outbox, such as an ML backend's, has no masks to compare with.
        asset_id = known.asset_ids.get(version) if version is not None else None
        before = prediction["result"] if prediction is not None and asset_id is not None else []
        judged = None
        if standing is Standing.CHOSEN:
            judged = compare(before, annotation.get("result") or [], asset_id=asset_id, size_hw=known.size_hw)
        rows.append(
            AnnotationRow(
                annotation_id=annotation["id"],
                annotator=annotator(annotation),
                standing=standing,
                ground_truth=bool(annotation.get("ground_truth")),
                lead_seconds=annotation.get("lead_time"),
                updated_at=datetime.fromisoformat(annotation["updated_at"]),
                model_version=version if asset_id is not None else None,
                asset_id=asset_id,
                unread=judged.unread if judged is not None else 0,
                regions=judged.regions if judged is not None else (),
            )
        )
    return rows


def _store(engine: Engine, place: Place, tasks: Sequence[Mapping[str, Any]]) -> int:
    """Judge a page of tasks and replace what is remembered of them; tasks of others are passed over."""
    named = [(str(task["data"].get("asset_id")), task) for task in tasks]
    with engine.begin() as db:
        known = reviewing.known_tasks(db, place=place, asset_uids=[uid for uid, _ in named])
    judged = {
        known[uid].ls_task_id: judge_task(task, known[uid])
        for uid, task in named
        if uid in known and known[uid].task_id == task["id"]
    }
    with engine.begin() as db:
        reviewing.replace_annotations(db, annotations=judged)
    return len(judged)


def _changed_since(moment: datetime) -> list[dict[str, Any]]:
    """Filters, any of which lets through: changed at or after the moment, annotated, skipped."""
    written = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # Label Studio reads no other form
    worked_on = {"operator": "greater", "type": "Number", "value": 0}
    return [
        {"filter": "filter:tasks:updated_at", "operator": "greater_or_equal", "type": "Datetime", "value": written},
        {"filter": "filter:tasks:total_annotations", **worked_on},
        {"filter": "filter:tasks:cancelled_annotations", **worked_on},
    ]


def _sum(tallies: Iterable[Tally], key: Callable[[Tally], Key]) -> dict[Key, Numbers]:
    found: dict[Key, Numbers] = {}
    for tally in tallies:
        found.setdefault(key(tally), Numbers()).add(tally)
    return found
