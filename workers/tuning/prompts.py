"""Prompts as people give them: boxes that are a little off, clicks near an object's middle, clicks on errors.

All coordinates are x and y in pixels of the encoder's input.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.tuning.lessons import BoxXyxy, Cover, Target

_EXACT_BOXES = 0.5  # of all boxes: a detector's, or a careful person's
_LOOSE = 0.06  # of a side: the deviation of a corner in the others
_MOST_LOOSE_PX = 20.0  # SAM's authors' limit for an encoder of 1024 px
_CENTRAL_CLICKS = 0.6  # of all clicks; the others are anywhere inside

Xy = tuple[float, float]


def draw_box(rng: np.random.Generator, box_xyxy: BoxXyxy) -> BoxXyxy:
    """The object's box, half the time with corners that are a little off."""
    x0, y0, x1, y1 = box_xyxy
    if rng.random() < _EXACT_BOXES:
        return box_xyxy
    width, height = x1 - x0, y1 - y0
    shifts = rng.normal(0, _LOOSE, 4) * (width, height, width, height)
    shifts = np.clip(shifts, -_MOST_LOOSE_PX, _MOST_LOOSE_PX)
    ax, ay, bx, by = (float(value) for value in np.array(box_xyxy) + shifts)
    return min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)


def draw_click(rng: np.random.Generator, target: Target, cell_px: int) -> Xy:
    """A point inside the object: more often near its middle."""
    inside = target.patch > 127
    weights = _depth(inside) ** 2 if rng.random() < _CENTRAL_CLICKS else inside.astype(np.float64)
    if not weights.any():  # the object is smaller than a cell
        weights = target.patch.astype(np.float64)
    return _draw_point(rng, weights, target.corner_yx, cell_px)


def draw_correction(
    rng: np.random.Generator, logits: NDArray[np.float32], cover: Cover, cell_px: int
) -> tuple[Xy, int]:
    """A click on an error of a mask, and its label: 1 where the object is missing, 0 where the mask is too large.

    logits, cover: (H, W). Where nothing is wrong, a click inside the object.
    """
    inside, shown = cover > 0.5, logits > 0
    missing, extra = inside & ~shown, shown & ~inside
    label = int(missing.sum() >= extra.sum())
    chosen = missing if label else extra
    if not chosen.any():
        chosen = inside if inside.any() else cover >= cover.max()
    top, left, patch = _crop(chosen)
    depth = _depth(patch)
    weights = (depth >= depth.max()).astype(np.float64) if rng.random() < 0.5 else depth
    return _draw_point(rng, weights, (top, left), cell_px), label


def middle_of(mask: NDArray[np.bool_]) -> Xy:
    """The pixel (x, y) of a mask (H, W) that is farthest from its border, as SAM's authors click."""
    top, left, patch = _crop(mask)
    depth = _depth(patch)
    y, x = divmod(int(depth.argmax()), patch.shape[1])
    return float(left + x), float(top + y)


def _crop(mask: NDArray[np.bool_]) -> tuple[int, int, NDArray[np.bool_]]:
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    return y, x, mask[y : y + height, x : x + width]


def _depth(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The distance of each cell from the border, 0 outside. What is outside the array is outside the object."""
    padded = np.pad(inside.view(np.uint8), 1)
    return cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1].astype(np.float64)


def _draw_point(rng: np.random.Generator, weights: NDArray[np.float64], corner_yx: tuple[int, int], cell_px: int) -> Xy:
    """A random place in a random cell. The chance of a cell is its weight."""
    chances = np.cumsum(weights.ravel())
    cell = int(np.searchsorted(chances, rng.random() * chances[-1], side="right"))
    y, x = divmod(min(cell, weights.size - 1), weights.shape[1])
    return (
        float((corner_yx[1] + x + rng.random()) * cell_px - 0.5),
        float((corner_yx[0] + y + rng.random()) * cell_px - 0.5),
    )
