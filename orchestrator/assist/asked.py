"""What a reviewer asked, read from the body that Label Studio sends to an ML backend's /predict.

Everything in the body is untrusted. Nothing of it is used as a path or an address. What cannot be used is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from db.texts import is_storable
from orchestrator.label_studio.names import CLICK_CONTROL, PICK_CONTROL

MAX_PROMPTS = 100
_MAX_ID_CHARS = 200
_MAX_LABEL_CHARS = 1000

Region = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PointPrompt:
    """A key point: percent of the image, 0..100. inside: False with Alt held. control: `click` or `pick`."""

    id: str
    control: str
    x: float
    y: float
    inside: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxPrompt:
    """A rectangle: its bounding box x0, y0, x1, y1 in percent of the image, 0..100."""

    id: str
    box_xyxy: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request: its task, and the prompts in the order in which they were made, of one label.

    shown_ids: ids of the regions of the task's predictions, annotations and drafts. draft_ids: those of its drafts.
    """

    project_id: int
    task_id: int
    asset_uid: str
    label_config: str
    label: str | None
    points: tuple[PointPrompt, ...]
    box: BoxPrompt | None
    shown_ids: frozenset[str]
    draft_ids: frozenset[str]

    @property
    def first_id(self) -> str:
        """The id of the first prompt. It stays the same while more prompts are added for one object."""
        return self.points[0].id if self.points else self.box.id if self.box else ""


def read_asked(body: bytes) -> Asked | None:
    """Read a request's body. None without prompts (a task was opened), or with values that cannot be used."""
    try:
        document = orjson.loads(body)
        return _asked(document)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError):
        return None


def _asked(document: Any) -> Asked | None:
    task = document["tasks"][0]
    regions = [region for region in document["params"]["context"]["result"] if isinstance(region, dict)]
    if not 0 < len(regions) <= 2 * MAX_PROMPTS:
        return None
    prompts = [prompt for region in regions if (prompt := _prompt(region)) is not None]
    if not 0 < len(prompts) <= MAX_PROMPTS:
        return None
    boxes = [prompt for prompt in prompts if isinstance(prompt, BoxPrompt)]
    drafts = [draft for draft in task.get("drafts") or () if isinstance(draft, dict)]
    made = [one for name in ("predictions", "annotations") for one in task.get(name) or () if isinstance(one, dict)]
    draft_ids = frozenset(_ids(drafts))
    return Asked(
        project_id=int(str(document["project"]).partition(".")[0]),
        task_id=_whole(task["id"]),
        asset_uid=str(task["data"]["asset_id"])[:_MAX_ID_CHARS],
        label_config=str(document["label_config"]),
        label=_label(regions, prompts[-1].id),
        points=tuple(prompt for prompt in prompts if isinstance(prompt, PointPrompt)),
        box=boxes[-1] if boxes else None,
        shown_ids=frozenset(_ids(made)) | draft_ids,
        draft_ids=draft_ids,
    )


def _prompt(region: Region) -> PointPrompt | BoxPrompt | None:
    """A smart region as a prompt. None for other results, such as the label of a region."""
    kind = str(region.get("type")).removesuffix("labels")
    if kind not in ("keypoint", "rectangle"):
        return None
    own, value = _text(region["id"], _MAX_ID_CHARS), region["value"]
    x, y = _number(value["x"]), _number(value["y"])
    if kind == "keypoint":
        control = PICK_CONTROL if region.get("from_name") == PICK_CONTROL else CLICK_CONTROL
        return PointPrompt(
            id=own, control=control, x=_percent(x), y=_percent(y), inside=bool(region.get("is_positive", True))
        )
    width, height = _number(value["width"]), _number(value["height"])
    frame_wh = _number(region.get("original_width", 1)), _number(region.get("original_height", 1))
    return BoxPrompt(id=own, box_xyxy=_turned_box((x, y, width, height), _number(value.get("rotation", 0)), frame_wh))


def _turned_box(
    xywh: tuple[float, float, float, float], degrees: float, frame_wh: tuple[float, float]
) -> tuple[float, float, float, float]:
    """The bounding box, x0, y0, x1, y1 in percent, of a rectangle in percent that is turned around its corner x, y.

    It is turned in pixels. frame_wh: width and height of the image, or numbers in the same ratio.
    """
    x, y, width, height = xywh
    ratio = frame_wh[0] / frame_wh[1] if min(frame_wh) > 0 else 1.0  # a percent of the width, in percents of the height
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = [
        (x + u * cos - v * sin / ratio, y + u * ratio * sin + v * cos) for u in (0.0, width) for v in (0.0, height)
    ]
    xs, ys = zip(*corners, strict=True)
    return _percent(min(xs)), _percent(min(ys)), _percent(max(xs)), _percent(max(ys))


def _label(regions: Sequence[Region], newest_id: str) -> str | None:
    """The label of the newest prompt. It is in the prompt's own value, or in a result of the same id."""
    for region in regions:
        value = region.get("value")
        if region.get("id") != newest_id or not isinstance(value, dict):
            continue
        for name in (str(region.get("type")), "labels"):
            labels = value.get(name)
            if isinstance(labels, list) and labels:
                label = _text(labels[0], _MAX_LABEL_CHARS)
                return label if is_storable(label) else None
    return None


def _ids(made: Iterable[Region]) -> Iterable[str]:
    for one in made:
        for region in one.get("result") or ():
            if isinstance(region, dict):
                yield str(region.get("id"))


def _percent(value: float) -> float:
    if math.isnan(value):  # of numbers so large that they were computed to infinity
        raise ValueError("not a number")
    return min(max(value, 0.0), 100.0)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("not a finite number")
    return float(value)


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("not a whole number")
    return value


def _text(value: object, most_chars: int) -> str:
    if not isinstance(value, str) or len(value) > most_chars:
        raise ValueError("not a short text")
    return value
