"""From one request to its answer: finds the task, asks the decoder or the stored masks, and makes the regions."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from db import clicks
from db.clicks import Click, ClickedTask
from db.publishing import LsProject
from db.results import StoredMask
from db.session import Connection, DBAPIError, Engine
from db.states import AnsweredBy, ClickKind
from orchestrator.assist.asked import Asked, read_asked
from orchestrator.assist.boxes import Boxes
from orchestrator.assist.picks import pick_mask, shown_mask
from orchestrator.label_studio.config import ConfigError, Controls, address_regions, find_controls
from orchestrator.label_studio.entries import MAX_BRUSH_BYTES
from orchestrator.label_studio.names import ANSWER_PREFIX, PICK_CONTROL, RegionKind
from orchestrator.label_studio.regions import mask_ordinal, regions_of_mask
from workers.errors import redact
from workers.masks import Mask
from workers.prompts import Point, Prompt, PromptError
from workers.stored_masks import mask_of_row

AnswerKind = Literal["auto", "polygon", "brush", "rectangle", "all"]

# decode(task, prompt in pixels, COCO counts of the mask to refine or None) -> the mask, or None without an answer
Decode = Callable[[ClickedTask, Prompt, str | None], Mask | None]

NOTHING: dict[str, Any] = {"results": []}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meant:
    """What a request means. refined: the stored mask that its points change."""

    kind: ClickKind
    prompt: Prompt
    refined: StoredMask | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The mask of an answer. stored_n: the number of the stored mask that it is or replaces."""

    mask: Mask
    answered_by: AnsweredBy
    stored_n: int | None


class Assistant:
    """Answers requests. Thread-safe, and without a current image: everything it keeps belongs to one task and label.

    projects: the project numbers that it serves. Requests for another project get an empty answer.
    """

    def __init__(
        self, engine: Engine, server: str, projects: Collection[int], *, decode: Decode, as_: AnswerKind
    ) -> None:
        self._engine = engine
        self._server = server
        self._projects = frozenset(projects)
        self._decode = decode
        self._as = as_
        self._boxes = Boxes()

    def answer(self, body: bytes) -> dict[str, Any]:
        """The answer to the body of a /predict request. Never raises: the editor shows every error as an empty answer.

        A request without prompts gets no results at all. An empty result would be saved as a prediction.
        """
        began = time.perf_counter()
        asked = read_asked(body)
        if asked is None or asked.project_id not in self._projects:
            return NOTHING
        try:
            return self._answer(self._boxes.join(asked), began)
        except (DBAPIError, PromptError, ConfigError, ValueError) as error:
            log.warning("task %d: no answer: %s", asked.task_id, redact(" ".join(str(error).split())))
            return NOTHING

    def _answer(self, asked: Asked, began: float) -> dict[str, Any]:
        ls_project = LsProject(self._server, asked.project_id)
        with self._engine.begin() as db:
            task = clicks.clicked_task(db, ls_project=ls_project, task_id=asked.task_id, asset_uid=asked.asset_uid)
            meant = None if task is None else _meaning(db, task, asked)
        if task is None or meant is None:
            return NOTHING
        found = self._find(task, meant)
        result, region_id = [], None
        if found is not None:
            controls = find_controls(asked.label_config)
            region_id = _new_id() if found.stored_n is None else f"m{task.asset_id}-{found.stored_n}"
            result = _regions(controls, replace(found.mask, label=_label(controls, asked, found)), region_id, self._as)
            if found.stored_n is None:  # a stored mask may be in the task without having been accepted
                self._boxes.answered(asked, region_id)
        click = Click(
            ls_task_id=task.ls_task_id,
            kind=meant.kind,
            answered_by=found.answered_by if found is not None and result else AnsweredBy.NOTHING,
            label=asked.label,
            milliseconds=round(1000 * (time.perf_counter() - began)),
            prompt_id=asked.box.id if asked.box is not None else asked.first_id,
            region_id=region_id if result else None,
        )
        with self._engine.begin() as db:
            clicks.add_click(db, click=click)
        version = f"{task.model_version}/{click.answered_by}"
        return {
            "results": [{"model_version": version, "score": result[0]["score"] if result else 0.0, "result": result}]
        }

    def _find(self, task: ClickedTask, meant: _Meant) -> _Found | None:
        """The decoder's mask, else a stored one."""
        refined = meant.refined
        if meant.kind is not ClickKind.PICK:
            mask = self._decode(task, meant.prompt, None if refined is None else refined.counts)
            if mask is not None and mask.area_px > 0:
                stored_n = None if refined is None else refined.n
                return _Found(mask=mask, answered_by=AnsweredBy.DECODER, stored_n=stored_n)
        if refined is None:
            with self._engine.begin() as db:
                refined = pick_mask(db, asset_id=task.asset_id, prompt=meant.prompt, size_hw=task.size_hw)
        if refined is None:
            return None
        return _Found(mask=mask_of_row(refined, task.size_hw), answered_by=AnsweredBy.STORED, stored_n=refined.n)


def _meaning(db: Connection, task: ClickedTask, asked: Asked) -> _Meant | None:
    """What the prompts ask for. None: only points outside, and no shown mask under them.

    Points of `pick` choose a stored mask. Points of `click` beside them change it. Points of `click` that are all
    outside take a part from the shown mask under the first.
    """
    height, width = task.size_hw
    points = {point.id: (point.x * width / 100, point.y * height / 100, int(point.inside)) for point in asked.points}
    picked = tuple(points[point.id] for point in asked.points if point.control == PICK_CONTROL)
    clicked = tuple(points[point.id] for point in asked.points if point.control != PICK_CONTROL)
    if picked:
        pick = Prompt(points=picked) if any(inside for _, _, inside in picked) else None
        if pick is None or not clicked:
            return None if pick is None else _Meant(kind=ClickKind.PICK, prompt=pick)
        chosen = pick_mask(db, asset_id=task.asset_id, prompt=pick, size_hw=task.size_hw)
        return _Meant(kind=ClickKind.REFINE, prompt=Prompt(points=picked + clicked), refined=chosen)
    box = None if asked.box is None else _box_px(asked.box.box_xyxy, task.size_hw)
    if box is None and not any(inside for _, _, inside in clicked):
        return _without_part(db, task, asked, clicked)
    kind = ClickKind.POINT if box is None else ClickKind.MIXED if clicked else ClickKind.BOX
    return _Meant(kind=kind, prompt=Prompt(points=clicked, box_xyxy=box))


def _without_part(db: Connection, task: ClickedTask, asked: Asked, outside: tuple[Point, ...]) -> _Meant | None:
    """A shown mask from which these points take a part. Its own box tells the decoder which object is meant."""
    ordinals = (mask_ordinal(region_id, task.asset_id) for region_id in asked.shown_ids)
    numbers = [n for n in ordinals if n is not None and n < 2**31]
    mask = shown_mask(db, asset_id=task.asset_id, point=outside[0], numbers=numbers, size_hw=task.size_hw)
    if mask is None:
        return None
    x, y, w, h = mask.bbox_xywh
    return _Meant(kind=ClickKind.REFINE, prompt=Prompt(points=outside, box_xyxy=(x, y, x + w, y + h)), refined=mask)


def _box_px(box_xyxy: tuple[float, float, float, float], size_hw: tuple[int, int]) -> tuple[float, float, float, float]:
    """From percent to pixels. A box thinner than a pixel becomes a pixel wide."""
    height, width = size_hw
    x0, y0, x1, y1 = (side * size / 100 for side, size in zip(box_xyxy, (width, height) * 2, strict=True))
    x0, y0 = min(x0, width - 1.0), min(y0, height - 1.0)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def _label(controls: Controls, asked: Asked, found: _Found) -> str | None:
    """The label that the reviewer chose, else the stored mask's, else the config's only one."""
    offered = {label for control in controls.by_kind.values() for label in control.labels}
    if asked.label is not None or found.mask.label in offered:
        return asked.label or found.mask.label
    return min(offered, default=None)


def _regions(controls: Controls, mask: Mask, region_id: str, as_: AnswerKind) -> list[dict[str, Any]]:
    """The mask as regions that the project's config can hold, under this id. With `all`: one of each kind."""
    result: list[dict[str, Any]] = []
    for kind in _kinds(controls, as_):
        own_id = region_id if not result else _new_id()
        result += regions_of_mask(mask, region_id=own_id, as_=kind, max_brush_bytes=MAX_BRUSH_BYTES)
    address_regions(controls, result)
    return result


def _new_id() -> str:
    return f"{ANSWER_PREFIX}{secrets.token_hex(5)}"


def _kinds(controls: Controls, as_: AnswerKind) -> Sequence[RegionKind]:
    """The kinds to answer with: those that were asked for, of those that the config has."""
    kinds: tuple[RegionKind, ...] = ("polygon", "brush", "rectangle")
    present = [kind for kind in kinds if kind in controls.by_kind]
    if as_ == "all":
        return present
    if as_ == "auto":
        return ["auto"] if {"polygon", "brush"} <= set(present) else present[:1]
    return [as_] if as_ in present else present[:1]
