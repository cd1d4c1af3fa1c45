"""How people changed a job's predictions in Label Studio: reads annotations, judges them, counts.

The rules for an asset's task in the project:
- Skipped annotations (was_cancelled), drafts and deleted annotations do not count. An asset is `skipped` if everyone
  who opened it skipped it. Without any annotation it is `waiting`.
- If one person made several annotations, the one changed last counts. If several people made some, one annotation is
  chosen for the asset: the one marked as ground truth, else the one changed last. So each prediction is judged once.
  The time of all people counts.
- An annotation is judged by the prediction it began from. If it began from another version than the job's, or from
  nothing, it is `elsewhere`: it is counted under its version and is in `export --reviewed`, but in no other number.
- kept: same pixels, same label. edited: pixels or labels (`relabelled`) differ; a second label or a lost label is also
  an edit. Its IoU compares the shown region with the region that came back. deleted: no region of the mask is left.
  added: drawn by a person. `verdicts` has the details.
- untouched: an asset with all predictions kept and nothing added. Masks that were not shown (beyond a task's limit of
  masks) are not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from db.annotations import (
    AnnotationRow,
    KnownTask,
    forget_unjudged,
    judgeable,
    known_tasks,
    remember_unjudged,
    replace_annotations,
    set_watermark,
    watermark,
)
from db.clicks import masks_by_number
from db.publishing import LsProject
from db.results import StoredMask
from db.session import Engine
from db.states import AnnotationStatus
from db.texts import is_storable
from orchestrator.label_studio.client import LabelStudio, has_asset_id
from orchestrator.label_studio.names import RegionKind
from orchestrator.label_studio.prompt_controls import prompt_controls
from orchestrator.label_studio.regions import mask_ordinal, regions_of_mask
from orchestrator.label_studio.verdicts import annotator, base_prediction, choose, compare, without_prompts
from workers.stored_masks import mask_of_row

_PAGE = 20  # whole tasks; one with 150 brush masks is 2 MB
_MOST_SECONDS = 1e9  # thirty years
# A change may be committed after another change with a later time.
_OVERLAP = timedelta(minutes=1)
_KINDS: Mapping[str, RegionKind] = {"polygon": "polygon", "brush": "brush", "rectangle": "rectangle"}


def pull(
    engine: Engine, client: LabelStudio, project_id: int, *, progress: Callable[[int], None] = lambda _: None
) -> int:
    """Read what changed in a project since the last time. Returns how many tasks were read.

    One page is read at a time, so memory does not grow with the project. No task is skipped between two pages, also
    when tasks are added or deleted meanwhile. Reading again does no harm. If an annotated task's prediction is not
    known yet (still `sending`, or imported by hand), the task is stored, and read again when the prediction is known.
    """
    ls_project = LsProject(client.url, project_id)
    prompts = prompt_controls(client.get_project(project_id).label_config)
    last = next(
        iter(client.list_tasks(project_id, include=("id", "updated_at"), ordering=("-tasks:updated_at",), page_size=1)),
        None,
    )
    if last is None:
        return 0
    newest = datetime.fromisoformat(last["updated_at"])
    with engine.begin() as db:
        seen = watermark(db, ls_project=ls_project)
    count = 0
    for filters in _passes(seen, newest):
        page: list[dict[str, Any]] = []
        for task in client.list_tasks(project_id, filters, whole=True, page_size=_PAGE):
            page.append(task)
            if len(page) == _PAGE:
                count += _store(engine, ls_project, page, prompts)
                progress(count)
                page = []
        count += _store(engine, ls_project, page, prompts)
    count += _read_again(engine, client, ls_project, prompts)
    progress(count)
    with engine.begin() as db:
        set_watermark(db, ls_project=ls_project, watermark=newest)
    return count


StoredMasks = Callable[[int, Sequence[int]], Sequence[StoredMask]]
"""Reads masks of an asset by their numbers."""


def judge_task(
    task: Mapping[str, Any],
    known: KnownTask,
    *,
    prompts: Collection[str] = (),
    stored_masks: StoredMasks = lambda asset_id, numbers: [],
) -> list[AnnotationRow]:
    """A task's annotations as rows, the chosen one compared with the prediction it began from.

    task: as Label Studio gives it, with its annotations and predictions. prompts: the names of the project's smart
    controls. stored_masks: for masks that no region showed and that a person picked.
    """
    annotations, predictions = task.get("annotations") or [], task.get("predictions") or []
    statuses = choose(annotations)
    rows = []
    for annotation in annotations:
        status = statuses[annotation["id"]]
        prediction = base_prediction(annotation, predictions)
        version = prediction["model_version"] if prediction is not None else None
        asset_id = _whose_masks(prediction, known)
        before = list(prediction["result"] or []) if prediction is not None and asset_id is not None else []
        if prediction is None:
            version, asset_id = _version_of_picks(annotation, known)
        judged = None
        if status is AnnotationStatus.CHOSEN:
            after = without_prompts(annotation.get("result") or [], prompts)
            if asset_id is not None:
                before += _picked(before, after, asset_id, known, stored_masks)
            judged = compare(before, after, asset_id=asset_id, size_hw=known.size_of(asset_id))
        rows.append(
            AnnotationRow(
                annotation_id=annotation["id"],
                annotator=annotator(annotation),
                standing=status,
                ground_truth=bool(annotation.get("ground_truth")),
                lead_seconds=_lead_seconds(annotation),
                updated_at=datetime.fromisoformat(annotation["updated_at"]),
                model_version=version if asset_id is not None else None,
                asset_id=asset_id,
                unread=judged.unreadable if judged is not None else 0,
                regions=judged.regions if judged is not None else (),
            )
        )
    return rows


def _lead_seconds(annotation: Mapping[str, Any]) -> float | None:
    """How long it took. None where it is not known: Label Studio takes any number that a script sends."""
    seconds = annotation.get("lead_time")
    return seconds if seconds is not None and 0 <= seconds <= _MOST_SECONDS else None


def _version_of_picks(annotation: Mapping[str, Any], known: KnownTask) -> tuple[str | None, int | None]:
    """The version, and the asset that owns its masks, whose masks were picked in an annotation that began from no
    prediction. None twice if there are none."""
    ids = [str(region.get("id")) for region in annotation.get("result") or () if isinstance(region, Mapping)]
    for version, asset_id in known.asset_ids.items():
        if any(mask_ordinal(own, asset_id) is not None for own in ids):
            return version, asset_id
    return None, None


def _picked(
    before: Sequence[Any], after: Sequence[Any], asset_id: int, known: KnownTask, stored_masks: StoredMasks
) -> list[dict[str, Any]]:
    """The regions, as the answer to a pick shows them, of stored masks that only the annotation has."""
    shown = {str(region.get("id")) for region in before if isinstance(region, Mapping)}
    kinds: dict[int, RegionKind] = {}
    for region in after:
        own, kind = (str(region.get(name)) for name in ("id", "type")) if isinstance(region, Mapping) else ("", "")
        n = mask_ordinal(own, asset_id)
        drawn_as = _KINDS.get(kind.removesuffix("labels"))  # not in a result about the region, such as a choice
        if n is not None and drawn_as is not None and own not in shown and own == f"m{asset_id}-{n}":
            kinds[n] = drawn_as
    size_hw = known.size_of(asset_id)
    if not kinds or size_hw is None:
        return []
    return [
        region
        for mask in stored_masks(asset_id, sorted(kinds))
        for region in regions_of_mask(mask_of_row(mask, size_hw), region_id=f"m{asset_id}-{mask.n}", as_=kinds[mask.n])
    ]


def _whose_masks(prediction: Mapping[str, Any] | None, known: KnownTask) -> int | None:
    """The asset whose masks a prediction shows. None if it is not from our outbox, such as an ML backend's.

    A prediction imported by hand may come from another job or database. Then its region ids hold asset ids from there.
    It has the version's name, but its masks are not the ones that we stored.
    """
    asset_id = None if prediction is None else known.asset_ids.get(prediction["model_version"])
    if prediction is None or asset_id is None:
        return None
    regions = [region for region in prediction.get("result") or () if isinstance(region, Mapping)]
    ours = any(mask_ordinal(str(region.get("id")), asset_id) is not None for region in regions)
    return asset_id if ours or not regions else None


def _read_again(engine: Engine, client: LabelStudio, ls_project: LsProject, prompts: Collection[str]) -> int:
    """Read the tasks that could not be judged before and can be now. Returns how many."""
    with engine.begin() as db:
        asset_uids = judgeable(db, ls_project=ls_project)
    count = 0
    task_ids = list(asset_uids)
    for start in range(0, len(task_ids), _PAGE):
        ids = task_ids[start : start + _PAGE]
        found = client.list_tasks(
            ls_project.project_id, [has_asset_id([asset_uids[i] for i in ids])], whole=True, page_size=_PAGE
        )
        tasks = [task for task in found if task["id"] in ids]
        count += _store(engine, ls_project, tasks, prompts)
        with engine.begin() as db:
            gone = set(ids) - {task["id"] for task in tasks}
            forget_unjudged(db, ls_project=ls_project, task_ids=list(gone))
    return count


def _store(engine: Engine, ls_project: LsProject, tasks: Sequence[Mapping[str, Any]], prompts: Collection[str]) -> int:
    """Judge a page of tasks and replace their stored annotations. Tasks of others are left out."""
    named = [(str(task["data"]["asset_id"]), task) for task in tasks if "asset_id" in task["data"]]
    named = [(uid, task) for uid, task in named if is_storable(uid)]
    with engine.begin() as db:
        known = known_tasks(db, ls_project=ls_project, asset_uids=[uid for uid, _ in named])
        ours = [(known[uid], task) for uid, task in named if uid in known and known[uid].task_id == task["id"]]
        judged = {
            one.ls_task_id: judge_task(
                task,
                one,
                prompts=prompts,
                stored_masks=lambda asset_id, numbers: masks_by_number(db, asset_id=asset_id, numbers=numbers),
            )
            for one, task in ours
        }
    waiting = {
        task["id"]: uid
        for uid, task in named
        if task.get("annotations") and not (uid in known and known[uid].is_whole and known[uid].task_id == task["id"])
    }
    with engine.begin() as db:
        changed_at = {one.ls_task_id: datetime.fromisoformat(task["updated_at"]) for one, task in ours}
        replace_annotations(db, annotations=judged, changed_at=changed_at)
        remember_unjudged(db, ls_project=ls_project, asset_uids=waiting)
        forget_unjudged(db, ls_project=ls_project, task_ids=[t["id"] for _, t in named if t["id"] not in waiting])
    return len(judged)


def _passes(seen: datetime | None, newest: datetime) -> list[list[dict[str, Any]]]:
    """Filters for each pass over the project: what changed since it was read, at first whatever anybody worked on."""
    if seen is not None:
        return [[_changed_since(seen - _OVERLAP)]]
    annotated = {"filter": "filter:tasks:total_annotations", "operator": "greater", "type": "Number", "value": 0}
    skipped = {**annotated, "filter": "filter:tasks:cancelled_annotations"}
    return [[annotated], [skipped, {**annotated, "operator": "equal"}], [_changed_since(newest)]]


def _changed_since(moment: datetime) -> dict[str, Any]:
    """The filter for tasks that were changed at or after the moment."""
    written = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # the only form that Label Studio reads
    return {"filter": "filter:tasks:updated_at", "operator": "greater_or_equal", "type": "Datetime", "value": written}
