"""The box of a COCO annotation: its bbox. If that is missing or empty, the box around its segmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orchestrator.prompts.entries import shown
from workers.prompts import PromptError

_MOST_SIDE = 1 << 20


class FoundBox(NamedTuple):
    """box_xyxy: four values as in the file, unchecked. size_wh: the frame's size, if the segmentation gives it."""

    box_xyxy: Sequence[object]
    size_wh: tuple[int, int] | None


def box_of(annotation: Mapping[str, Any]) -> FoundBox:
    """Raises PromptError, with what was found, if neither a box nor a segmentation can be read."""
    bbox, segmentation = annotation.get("bbox"), annotation.get("segmentation")
    if isinstance(bbox, list) and len(bbox) == 4 and not any(_is_zero(value) for value in bbox[2:]):
        if not all(map(_is_number, bbox)):
            raise PromptError(f"bbox: {shown(bbox)}, expected [x, y, width, height] in numbers")
        x, y, width, height = (float(value) for value in bbox)
        return FoundBox((x, y, x + width, y + height), None)
    if isinstance(segmentation, list) and segmentation:
        return _around_polygons(segmentation)
    if isinstance(segmentation, dict):
        return _around_rle(segmentation)
    if bbox is None:
        raise PromptError("no bbox and no segmentation, expected one of them")
    raise PromptError(f"bbox: {shown(bbox)} and no segmentation, expected [x, y, width, height] with an area")


def _around_polygons(segmentation: Sequence[Any]) -> FoundBox:
    # Some tools write one polygon without the list around it.
    polygons = [segmentation] if all(map(_is_number, segmentation)) else segmentation
    xs: list[float] = []
    ys: list[float] = []
    for polygon in polygons:
        flat = _flat(polygon)
        if flat is None or len(flat) < 6 or len(flat) % 2:
            raise PromptError(f"segmentation: {shown(polygon)}, expected [x1, y1, x2, y2, x3, y3, …]")
        xs += flat[::2]
        ys += flat[1::2]
    return FoundBox((min(xs), min(ys), max(xs), max(ys)), None)


def _flat(polygon: object) -> list[float] | None:
    """[x, y, …], from [x, y, …] or [[x, y], …]; None for anything else."""
    if not isinstance(polygon, list):
        return None
    if all(isinstance(point, list) and len(point) == 2 for point in polygon):
        polygon = [value for point in polygon for value in point]
    return [float(value) for value in polygon] if all(map(_is_number, polygon)) else None


def _around_rle(rle: Mapping[str, Any]) -> FoundBox:
    size = rle.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(_is_count(n) and 0 < n <= _MOST_SIDE for n in size)):
        raise PromptError(f"segmentation: size {shown(size)}, expected [height, width]")
    height, width = size
    told = rle.get("counts")
    counts = _parse_counts(told) if isinstance(told, str) else told
    if not isinstance(counts, list) or not all(map(_is_count, counts)) or sum(counts) != height * width:
        raise PromptError(f"segmentation: counts {shown(told)}, expected runs that add up to {height} x {width} pixels")
    box = _around_runs(counts, height)
    if box is None:
        raise PromptError("segmentation: a mask without a pixel, expected an object")
    return FoundBox(box, (width, height))


def _around_runs(counts: Sequence[int], height: int) -> tuple[int, int, int, int] | None:
    """The box around the runs. Runs go down the columns and begin with background. None if no run has a pixel."""
    tops, bottoms, columns = [], [], []
    position = 0
    for n, count in enumerate(counts):
        if n % 2 and count:
            first, last = divmod(position, height), divmod(position + count - 1, height)
            columns += [first[0], last[0]]
            is_tall = first[0] != last[0]
            tops.append(0 if is_tall else first[1])
            bottoms.append(height if is_tall else last[1] + 1)
        position += count
    return (min(columns), min(tops), max(columns) + 1, max(bottoms)) if columns else None


def _parse_counts(text: str) -> list[int] | None:
    """COCO's compressed run lengths; None if the text is none. Source: cocoapi maskApi.c, rleFrString."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        # From the fourth on, a count is stored as the difference with the one two places before.
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return None if shift or any(count < 0 for count in counts) else counts


def _is_number(value: object) -> bool:
    """Whether this is a number that fits a float. JSON can give whole numbers of any length."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e15 if isinstance(value, int) else math.isfinite(value)


def _is_zero(value: object) -> bool:
    return _is_number(value) and value == 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_SIDE**2
