"""One line of a YOLO label file to a box: which of the line's values mean what.

A line is a class number and then a box (x y width height, fractions of the image, centre first), a polygon or the
corners of a rotated box (x1 y1 x2 y2 …), or a box with key points. A confidence and a track id may follow. The file
does not say which. So every form that the values allow is found. If several give different boxes, the lines of the same
data set that allow only one form decide. If those do not decide either, the line is refused.

Source of the forms: ultralytics, `Results.save_txt` and its data set pages for detect, segment, pose and obb.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from orchestrator.prompts.entries import shown
from orchestrator.prompts.yolo_names import KeyPoints
from workers.prompts import BoxXyxy, PromptError

_EXPECTED = (
    "expected a class number and `x y width height`, `x1 y1 x2 y2 x3 y3 …` or a box with key points, in fractions of "
    "the image; a confidence 0..1 and a track id may follow"
)
# Programs round values, and ultralytics' own check allows 1 %. Shapes that reach out of the picture are cut later.
_MOST_BOX = 0.01
_MOST_POLYGON = 0.5
# What every COCO pose model writes. Predictions come without a data.yaml, so this number is tried.
_COCO_KEY_POINTS = 17
_CORNER_POINTS = 3  # a polygon has at least three


class Shape(StrEnum):
    """What a line's first values mean."""

    BOX = "a box"
    POLYGON = "a polygon"
    POSE = "a box with key points"


class Tail(StrEnum):
    """What a line's last values mean."""

    NONE = ""
    SCORE = "a confidence"
    ID = "a track id"
    SCORE_AND_ID = "a confidence and a track id"


class Form(NamedTuple):
    """A form of a line."""

    shape: Shape
    tail: Tail

    def __str__(self) -> str:
        return f"{self.shape} and {self.tail}" if self.tail else str(self.shape)


class Line(NamedTuple):
    """A line whose words are numbers. words: as written, after the class number. is_float_table: the class number is
    written with decimals, so a track id may be too."""

    class_number: int
    words: tuple[str, ...]
    is_float_table: bool

    @property
    def values(self) -> list[float]:
        return [float(word) for word in self.words]


class Reading(NamedTuple):
    """box_xyxy: fractions of the image. score: 0..1, if the line has one."""

    box_xyxy: BoxXyxy
    score: float | None


Forms = Counter[Form]
"""How many lines of a data set allow only this form."""


def parse_line(text: str) -> Line:
    """Read a line's numbers. Raises PromptError with the word that is no number."""
    first, *words = text.split()
    for word in words:
        if not _is_number(word):
            raise PromptError(f"{shown(text)}: {shown(word)} is no finite number, {_EXPECTED}")
    # Some programs save the whole table as floats: 0.0 is class 0.
    if not _is_number(first) or float(first) < 0 or float(first) != int(float(first)):
        raise PromptError(f"{shown(text)}: class {shown(first)}, {_EXPECTED}")
    return Line(class_number=int(float(first)), words=tuple(words), is_float_table=not first.isdecimal())


def readings(line: Line, key_points: KeyPoints | None) -> dict[Form, Reading]:
    """Every form that the values allow, with its box. key_points: from the data.yaml of this data set."""
    values = line.values
    found: dict[Form, Reading] = {}
    for tail, score, kept in _tails(line, values):
        shape_values = values[:kept]
        if box := _box(shape_values):
            found[Form(Shape.BOX, tail)] = Reading(box, score)
        if key_points is None and (box := _polygon(shape_values)):
            found[Form(Shape.POLYGON, tail)] = Reading(box, score)
        if _is_pose(line.words[:kept], key_points) and (box := _box(shape_values[:4])):
            found[Form(Shape.POSE, tail)] = Reading(box, score)
    return found


def alone(found: dict[Form, Reading]) -> Form | None:
    """The form, if a line allows only one. Its count decides about other lines of the data set."""
    return next(iter(found)) if len(found) == 1 else None


def decide(line: Line, found: dict[Form, Reading], forms: Forms, key_points: KeyPoints | None) -> Reading:
    """The line's box. Raises PromptError if no form fits, or if several differ and no other line decides."""
    if not found:
        raise PromptError(_nothing_fits(line, key_points))
    known = {form: reading for form, reading in found.items() if forms[form]} or found
    boxes = {reading.box_xyxy for reading in known.values()}
    if len(boxes) > 1:
        listed = " or ".join(map(str, known))
        raise PromptError(
            f"{shown(' '.join(line.words))} after the class may be {listed}, and no other line says which; "
            "expected data.yaml with kpt_shape for key points, a confidence before a track id, files of one form"
        )
    # A 1 may be a confidence or the first track's id. An id must never become a score.
    scores = {reading.score for reading in known.values()}
    return Reading(box_xyxy=boxes.pop(), score=scores.pop() if len(scores) == 1 else None)


def _tails(line: Line, values: Sequence[float]) -> list[tuple[Tail, float | None, int]]:
    """What may follow the shape: (tail, score, number of values before the tail)."""
    n = len(values)
    found: list[tuple[Tail, float | None, int]] = [(Tail.NONE, None, n)]
    if n < 5:
        return found
    if 0 <= values[-1] <= 1:
        found.append((Tail.SCORE, values[-1], n - 1))
    if _ends_in_track_id(line):
        found.append((Tail.ID, None, n - 1))
        if n >= 6 and 0 <= values[-2] <= 1:
            found.append((Tail.SCORE_AND_ID, values[-2], n - 2))
    return found


def _ends_in_track_id(line: Line) -> bool:
    """Ids are whole numbers from 1. A coordinate of 1 may have decimals. An id has them only if the class has them."""
    word = line.words[-1]
    value = float(word)
    return value >= 1 and value == int(value) and (value > 1 or word.isdecimal() or line.is_float_table)


def _box(values: Sequence[float]) -> BoxXyxy | None:
    if len(values) != 4:
        return None
    x, y, width, height = values
    if not all(-_MOST_BOX <= value <= 1 + _MOST_BOX for value in values) or width < 0 or height < 0:
        return None
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _polygon(values: Sequence[float]) -> BoxXyxy | None:
    """The box around a polygon. Corners may lie a little outside, as at a rotated box near the border."""
    if len(values) < 2 * _CORNER_POINTS or len(values) % 2:
        return None
    if not all(-_MOST_POLYGON <= value <= 1 + _MOST_POLYGON for value in values):
        return None
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])


def _is_pose(words: Sequence[str], key_points: KeyPoints | None) -> bool:
    """Whether the values after the first four are key points."""
    rest = [float(word) for word in words[4:]]
    if key_points is not None:
        return len(rest) == key_points.points * key_points.values
    box = _box([float(word) for word in words[:4]])
    if not rest or len(rest) % 3 or box is None:
        return False
    points = list(zip(rest[::3], rest[1::3], rest[2::3], strict=True))
    if all(word in ("0", "1", "2") for word in words[6::3]):  # not labeled, hidden, visible
        return _are_inside([(x, y) for x, y, _ in points if x or y], box)
    sure = [(x, y) for x, y, v in points if v > 0.5]
    return len(points) == _COCO_KEY_POINTS and len(sure) >= 3 and _are_inside(sure, box)


def _are_inside(points_xy: Sequence[tuple[float, float]], box: BoxXyxy) -> bool:
    """Whether the box lies in the image and the points in the box, or near it."""
    x0, y0, x1, y1 = box
    if min(x0, y0) < -_MOST_BOX or max(x1, y1) > 1 + _MOST_BOX:
        return False
    margin_x, margin_y = 0.2 * (x1 - x0), 0.2 * (y1 - y0)
    return all(x0 - margin_x <= x <= x1 + margin_x and y0 - margin_y <= y <= y1 + margin_y for x, y in points_xy)


def _nothing_fits(line: Line, key_points: KeyPoints | None) -> str:
    found = f"{len(line.words)} numbers after the class: {shown(' '.join(line.words))}"
    if any(abs(value) > 1 + _MOST_POLYGON for value in line.values[:4]):
        return f"{found}; coordinates of pixels? {_EXPECTED}"
    if key_points is not None:
        return (
            f"{found}; data.yaml says kpt_shape [{key_points.points}, {key_points.values}]: expected "
            f"{4 + key_points.points * key_points.values}, then perhaps a confidence 0..1 and a track id"
        )
    if len(line.words) == 5 and not 0 <= line.values[-1] <= 1:
        return f"{found}; {line.words[-1]} is neither a confidence 0..1 nor a track id, {_EXPECTED}"
    return f"{found}; {_EXPECTED}"


def _is_number(word: str) -> bool:
    try:
        # float() also reads 1_000 and digits of other scripts. No program writes those on purpose.
        return word.isascii() and "_" not in word and math.isfinite(float(word))
    except ValueError:
        return False
