"""Prompts: where a person or a detector says an object is. Their values, their JSON, and how they are put on an image.

Coordinates are pixels of the upright image, x to the right and y down. A box ends where its last pixel ends, so x1 may
equal the image's width. Errors that do not depend on the image (NaN, an inverted box) are raised when a prompt is read.
Errors that depend on the image's size are raised by `fit`. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from db.texts import is_storable

Point = tuple[float, float, int]
BoxXyxy = tuple[float, float, float, float]
PromptKind = Literal["box", "points", "text", "exemplar"]

_BOXES = ("box_xyxy", "exemplar_box_xyxy", "negative_box_xyxy")
_SHOWN_CHARS = 80
_SAME_RATIO = 0.01  # of the sides of a thumbnail and of its picture: both are whole pixels
_MOST_POINTS = 1000  # in one prompt; SAM was trained with about ten


class PromptError(ValueError):
    """A prompt cannot be used. The message says what was found and what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One thing to look for. Checked when made: all values are finite, boxes have an area, there is something to find.

    points: (x, y, 1 inside or 0 outside). box_xyxy: around the object. text: a phrase. exemplar_box_xyxy,
    negative_box_xyxy: around an object of the kind that is meant, or not meant. score: the detector's, 0..1. size_wh:
    the image size for the coordinates, if it is not the image's own; (1, 1) for fractions.
    """

    label: str | None = None
    points: tuple[Point, ...] = ()
    box_xyxy: BoxXyxy | None = None
    text: str | None = None
    exemplar_box_xyxy: BoxXyxy | None = None
    negative_box_xyxy: BoxXyxy | None = None
    score: float | None = None
    size_wh: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, box in _boxes_of(self):
            _check_box(name, box)
        for x, y, inside in self.points:
            if not (math.isfinite(x) and math.isfinite(y)) or inside not in (0, 1):
                raise PromptError(
                    f"points: {_shown([x, y, inside])}, expected finite x and y, then 1 inside, 0 outside"
                )
        if not (self.box_xyxy or self.points or self.text or self.exemplar_box_xyxy):
            raise PromptError("nothing to look for: expected box_xyxy, points, text or exemplar_box_xyxy")
        if len(self.points) > _MOST_POINTS:
            raise PromptError(f"points: {len(self.points)} in one prompt, expected at most {_MOST_POINTS}")
        if self.points and not (self.box_xyxy or self.text or any(inside for _, _, inside in self.points)):
            raise PromptError("points: all are outside (0), expected one inside (1), or a box_xyxy")
        if self.score is not None and not 0 <= self.score <= 1:
            raise PromptError(f"score: {self.score:g}, expected 0..1")
        if self.size_wh is not None and not all(math.isfinite(side) and side > 0 for side in self.size_wh):
            raise PromptError(f"size_wh: {_shown(self.size_wh)}, expected the image's width and height")

    @property
    def kinds(self) -> frozenset[PromptKind]:
        """The kinds of prompts that a model must take to answer this one."""
        asked: dict[PromptKind, bool] = {
            "box": self.box_xyxy is not None,
            "points": bool(self.points),
            "text": self.text is not None,
            "exemplar": self.exemplar_box_xyxy is not None or self.negative_box_xyxy is not None,
        }
        return frozenset(kind for kind, is_asked in asked.items() if is_asked)

    def as_json(self) -> dict[str, Any]:
        """JSON-safe, without empty fields. `parse_prompt` reads it back."""
        values = ((name, getattr(self, name)) for name in _KNOWN)
        return {name: value for name, value in values if value is not None and value != ()}


_KNOWN = tuple(Prompt.__dataclass_fields__)


def parse_prompt(value: object) -> Prompt:
    """Read one prompt of a JSON document. Raises PromptError with the key, what was found and what was expected."""
    if not isinstance(value, dict):
        raise PromptError(
            f"{_shown(value)}, expected an object such as {{'label': 'car', 'box_xyxy': [x0, y0, x1, y1]}}"
        )
    given = {name: found for name, found in value.items() if found is not None}
    unknown = [name for name in given if name not in _KNOWN]
    if unknown:
        raise PromptError(f"unknown key {_shown(unknown[0])}, expected {', '.join(_KNOWN)}")
    return Prompt(
        label=_text(given, "label"),
        text=_text(given, "text"),
        points=_points(given.get("points", [])),
        score=_number("score", given["score"]) if "score" in given else None,
        size_wh=_size_wh(given["size_wh"]) if "size_wh" in given else None,
        **{name: _box(name, given[name]) for name in _BOXES if name in given},
    )


def fit(prompt: Prompt, size_wh: tuple[int, int]) -> Prompt:
    """The prompt in pixels of an upright image of this size, its boxes cut to it.

    Raises PromptError if a box is fully outside, if a point is outside, or if the coordinates are of the image lying on
    its side. That happens when a tool ignored the EXIF rotation.
    """
    scaled = _scale(prompt, size_wh)
    width, height = size_wh
    for x, y, _ in scaled.points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise PromptError(f"points: {_shown([x, y])} lies outside the image of {width} x {height} pixels")
    boxes: dict[str, Any] = {name: _cut(name, box, size_wh) for name, box in _boxes_of(scaled)}
    return replace(scaled, **boxes)


def _scale(prompt: Prompt, size_wh: tuple[int, int]) -> Prompt:
    if prompt.size_wh is None or prompt.size_wh == size_wh:
        return replace(prompt, size_wh=None)
    if _lies_on_its_side(prompt.size_wh, size_wh):
        raise PromptError(
            f"coordinates of a picture of {_shown(prompt.size_wh)} pixels, which is {_shown(size_wh)} when it stands "
            "upright: expected coordinates in the upright image, its EXIF rotation applied"
        )
    sx, sy = (own / given for own, given in zip(size_wh, prompt.size_wh, strict=True))
    boxes: dict[str, Any] = {name: (x0 * sx, y0 * sy, x1 * sx, y1 * sy) for name, (x0, y0, x1, y1) in _boxes_of(prompt)}
    points = tuple((x * sx, y * sy, inside) for x, y, inside in prompt.points)
    return replace(prompt, size_wh=None, points=points, **boxes)


def _lies_on_its_side(frame_wh: tuple[float, float], size_wh: tuple[int, int]) -> bool:
    """Whether a frame, such as a thumbnail's, has the sides of the upright image in the other order."""
    (frame_width, frame_height), (width, height) = frame_wh, size_wh
    is_turned = math.isclose(frame_width * width, frame_height * height, rel_tol=_SAME_RATIO)
    is_upright = math.isclose(frame_width * height, frame_height * width, rel_tol=3 * _SAME_RATIO)
    return frame_wh == size_wh[::-1] or (is_turned and not is_upright)


def _boxes_of(prompt: Prompt) -> list[tuple[str, BoxXyxy]]:
    return [(name, box) for name in _BOXES if (box := getattr(prompt, name)) is not None]


def _cut(name: str, box: BoxXyxy, size_wh: tuple[int, int]) -> BoxXyxy:
    width, height = size_wh
    x0, y0, x1, y1 = box
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise PromptError(f"{name}: {_shown(box)} lies outside the image of {width} x {height} pixels")
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def _check_box(name: str, box: BoxXyxy) -> None:
    x0, y0, x1, y1 = box
    if not all(math.isfinite(value) for value in box):
        raise PromptError(f"{name}: {_shown(box)}, expected four finite numbers")
    if x1 <= x0 or y1 <= y0:
        found = "is inverted" if x1 < x0 or y1 < y0 else "has no area"
        raise PromptError(f"{name}: {_shown(box)} {found}, expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1")


def _box(name: str, value: object) -> BoxXyxy:
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise PromptError(f"{name}: {_shown(value)}, expected [x0, y0, x1, y1]")
    x0, y0, x1, y1 = (_number(name, one) for one in value)
    return x0, y0, x1, y1


def _points(value: object) -> tuple[Point, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 3 for p in value):
        raise PromptError(f"points: {_shown(value)}, expected [[x, y, 1 inside or 0 outside], …]")
    # int() would make 0 of 0.7. Some programs write 1.0 for 1.
    return tuple((_number("points", x), _number("points", y), _inside(inside)) for x, y, inside in value)


def _inside(value: object) -> int:
    if isinstance(value, int | float) and value in (0, 1):
        return int(value)
    raise PromptError(f"points: third value {_shown(value)}, expected 1 inside or 0 outside")


def _size_wh(value: object) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PromptError(f"size_wh: {_shown(value)}, expected [width, height]")
    return _number("size_wh", value[0]), _number("size_wh", value[1])


def _text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or not is_storable(value):
        raise PromptError(f"{name}: {_shown(value)}, expected words")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PromptError(f"{name}: {_shown(value)}, expected a number")
    try:
        return float(value)
    except OverflowError as error:
        raise PromptError(f"{name}: {_shown(value)}, expected pixels") from error


def _shown(value: object) -> str:
    """A value that was found, short and printable."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print numbers that long
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list | tuple):
        shown = "[" + ", ".join(_shown(one) for one in value[:8]) + (", …]" if len(value) > 8 else "]")
    else:
        shown = f"{value:g}" if isinstance(value, float) else repr(value)
    return shown if len(shown) <= _SHOWN_CHARS else shown[:_SHOWN_CHARS] + "…"


def takes(prompt: Prompt, taken: Collection[PromptKind]) -> str | None:
    """None if a model that takes these kinds can answer the prompt; else what it cannot answer."""
    missing = sorted(prompt.kinds - set(taken))
    if not missing:
        return None
    return f"a prompt by {' and '.join(missing)}, expected {' or '.join(taken) or 'a job without prompts'}"


def asks_one_point(prompt: Prompt) -> bool:
    """Whether SAM's authors advise to take the best of three masks. They do for one point, which is ambiguous. For more
    points or a box they do not."""
    return len(prompt.points) == 1 and prompt.box_xyxy is None


def fit_all(asked: Sequence[object], size_wh: tuple[int, int]) -> tuple[dict[int, Prompt], list[str]]:
    """Put an asset's stored prompts on its image. Returns the usable ones by number, and what is wrong with the others.

    A stored prompt is a prompt's JSON, or {"error": what was wrong with it when it was read}.
    """
    usable: dict[int, Prompt] = {}
    wrong: list[str] = []
    for index, stored in enumerate(asked):
        if isinstance(stored, dict) and "error" in stored:
            wrong.append(str(stored["error"]))
            continue
        try:
            usable[index] = fit(parse_prompt(stored), size_wh)
        except PromptError as error:
            wrong.append(f"prompt {index}: {error}")
    return usable, wrong
