"""The choice of a stored mask by points or a box. It needs no model and no embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from db import clicks
from db.results import StoredMask
from db.session import Connection
from orchestrator.shapes.runs import edges_from_counts
from workers.prompts import Point, Prompt

Hw = tuple[int, int]


def pick_mask(db: Connection, *, asset_id: int, prompt: Prompt, size_hw: Hw) -> StoredMask | None:
    """The smallest stored mask that holds all inside points and no outside point. A box alone: the mask that fits it.

    If no mask holds all points, the newest inside point decides: the smallest mask that holds it, else the smallest
    whose box holds it. With a box and points inside, only the points count; with points outside alone, only the box: no
    answer would take the box's own from the reviewer's screen. prompt: in pixels. None: no mask is there.
    """
    inside = [point for point in prompt.points if point[2]]
    outside = [point for point in prompt.points if not point[2]]
    if not inside:
        return None if prompt.box_xyxy is None else clicks.mask_of_box(db, asset_id=asset_id, box_xyxy=prompt.box_xyxy)
    row, column = _pixel(inside[-1], size_hw)
    around = clicks.masks_around(db, asset_id=asset_id, x=column, y=row)
    boxed = holding = None
    for mask in around:
        held = _holds(mask, [*inside, *outside], size_hw)
        if any(held[len(inside) :]):
            continue
        if all(held[: len(inside)]):
            return mask
        if held[len(inside) - 1]:
            holding = holding or mask
        boxed = boxed or mask
    return holding or boxed


def shown_mask(
    db: Connection, *, asset_id: int, point: Point, numbers: Sequence[int], size_hw: Hw
) -> StoredMask | None:
    """The smallest of these masks of an asset that holds a point. numbers: their `n`."""
    masks = clicks.masks_by_number(db, asset_id=asset_id, numbers=numbers)
    holding = [mask for mask in masks if _holds(mask, [point], size_hw)[0]]
    return min(holding, key=lambda mask: (mask.area_px, mask.n), default=None)


def _holds(mask: StoredMask, points: Sequence[Point], size_hw: Hw) -> list[bool]:
    """Whether the mask has the pixel of each point. Reads its run lengths and paints nothing."""
    edges = edges_from_counts(mask.counts, size_hw)
    pixels = [_pixel(point, size_hw) for point in points]
    at = np.array([column * size_hw[0] + row for row, column in pixels])
    found: list[bool] = (np.searchsorted(edges, at, side="right") % 2 == 1).tolist()
    return found


def _pixel(point: Point, size_hw: Hw) -> tuple[int, int]:
    """Row and column of the pixel that a point lies in. A point on the right or lower border is in the last pixel."""
    x, y, _ = point
    return min(int(y), size_hw[0] - 1), min(int(x), size_hw[1] - 1)
