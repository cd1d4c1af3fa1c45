"""Fills a mask's small holes and removes its small islands, like SamAutomaticMaskGenerator, inside the mask's own box.

Source: segment_anything/utils/amg.py, remove_small_regions. A region is small when it has less than `min_area` pixels,
8-connected. Holes are filled first. When every island is small, the largest stays.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.engine.boxed_runs import BoxedRuns, draw_runs, take_runs
from workers.masks import BoolMask

# Sides of the box, as (axis of pixels (x, y), index along it).
_SIDES = ((0, 0), (1, 0), (0, -1), (1, -1))


def remove_small_regions(runs: BoxedRuns, size_hw: tuple[int, int], min_area: int) -> tuple[BoxedRuns, bool]:
    """The mask without its small regions, and whether that changed it."""
    pixels, corner, open_sides = _draw_with_surroundings(runs, size_hw, min_area)
    holes = _small_regions(~pixels, min_area, open_sides)
    filled = pixels | holes if holes is not None else pixels
    islands = _small_islands(filled, min_area)
    if holes is None and islands is None:
        return runs, False
    return take_runs(filled if islands is None else filled & ~islands, corner), True


def _draw_with_surroundings(
    runs: BoxedRuns, size_hw: tuple[int, int], min_area: int
) -> tuple[BoolMask, tuple[int, int], list[tuple[int, int]]]:
    """The mask with background around it: (pixels (x, y), their corner, the open sides).

    An open side is a side where the frame continues outside these pixels. At least `min_area` pixels of one background
    region lie there. When the frame has fewer pixels there, the whole frame is taken instead. The corner is even,
    because OpenCV numbers regions by blocks of two by two.
    """
    height, width = size_hw
    x0, y0, x1, y1 = runs.box
    left, top = max(x0 - 1, 0) & ~1, max(y0 - 1, 0) & ~1
    right, bottom = min(x1 + 2, width), min(y1 + 2, height)
    beyond = (left * height, top * width, (width - right) * height, (height - bottom) * width)
    if any(0 < area < min_area for area in beyond):
        left, top, right, bottom = 0, 0, width, height
        beyond = (0, 0, 0, 0)
    pixels = np.zeros((right - left, bottom - top), np.bool_)
    if runs.area_px:
        pixels[x0 - left : x1 + 1 - left, y0 - top : y1 + 1 - top] = draw_runs(runs)
    return pixels, (left, top), [side for side, area in zip(_SIDES, beyond, strict=True) if area]


def _small_regions(background: BoolMask, min_area: int, open_sides: list[tuple[int, int]]) -> BoolMask | None:
    """Which background pixels are holes to fill; None if there are none. A region at an open side is no hole."""
    regions, areas = _label(background)
    small = areas < min_area
    for axis, index in open_sides:
        small[np.unique(regions.take(index, axis))] = False
    small[0] = False
    return small[regions] if small.any() else None


def _small_islands(pixels: BoolMask, min_area: int) -> BoolMask | None:
    regions, areas = _label(pixels)
    small = areas < min_area
    small[0] = False
    if not small.any():
        return None
    if small[1:].all():
        small[1 + areas[1:].argmax()] = False
    return small[regions]


def _label(pixels: BoolMask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number the 8-connected regions in the reference's order: (numbers in the shape of pixels, areas by number)."""
    rows = np.ascontiguousarray(pixels.T).view(np.uint8)
    _, regions, stats, _ = cv2.connectedComponentsWithStats(rows, connectivity=8)
    return np.asarray(regions, np.int32).T, np.asarray(stats, np.int64)[:, cv2.CC_STAT_AREA]
