"""Greedy non-maximum suppression of boxes, one candidate at a time, so that the suppressed need no evaluation.

The arithmetic is torchvision's (ops/cpu/nms_kernel.cpp): float32 boxes whose width is x1 - x0, although both ends of
ours are inclusive, and an overlap compared in double precision. A candidate that is not kept never affects another,
so it may be dropped as soon as bounds of its box show that a kept box would suppress it, whatever its exact box is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]

# batched_nms takes another road for more boxes than this, whose order among equal scores is that of an unstable sort.
STABLE_UP_TO = 1000
# The bounds are computed in double precision, torchvision's overlaps in single.
ROUNDING = 1e-5


class Suppression:
    """The boxes kept so far of candidates offered by falling score."""

    def __init__(self, iou_threshold: float) -> None:
        self.iou_threshold = iou_threshold
        self._boxes: NDArray[np.float32] = np.zeros((64, 4), np.float32)
        self._kept = 0

    def keep(self, box: Sequence[int]) -> bool:
        """Keep the box unless one kept before overlaps it by more than the threshold."""
        kept, new = self._boxes[: self._kept], np.array(box, np.float32)
        shared, kept_area = _intersections(kept, new), _areas(kept)
        with np.errstate(invalid="ignore"):
            overlaps = shared / (kept_area + _areas(new) - shared)
        if (overlaps.astype(np.float64) > self.iou_threshold).any():
            return False
        if self._kept == len(self._boxes):
            self._boxes = np.concatenate([self._boxes, np.zeros_like(self._boxes)])
        self._boxes[self._kept] = new
        self._kept += 1
        return True

    def would_drop(self, inner: Sequence[int], outer: Sequence[int]) -> bool:
        """Whether every box that contains `inner` and lies in `outer` would be dropped by now."""
        kept = self._boxes[: self._kept]
        at_least = _intersections(kept, np.array(inner, np.float64))
        widest = np.array(outer, np.float64)
        joint = _areas(kept) + _areas(widest) - _intersections(kept, widest)
        return bool((at_least > (self.iou_threshold + ROUNDING) * joint).any())


def order_of_kept(kept: list[int], scores: NDArray[np.float32], survivors: int) -> list[int]:
    """The reference's order of the kept candidates, given by falling score and then by index.

    survivors: how many entered the suppression. Only among equal scores, and beyond STABLE_UP_TO, is it another.
    """
    if survivors <= STABLE_UP_TO:
        return kept
    by_index = torch.tensor(sorted(kept))
    order = torch.from_numpy(scores)[by_index].sort(descending=True)[1]
    ordered: list[int] = by_index[order].tolist()
    return ordered


def _areas(boxes: Floats) -> Floats:
    areas: Floats = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return areas


def _intersections(boxes: Floats, box: Floats) -> Floats:
    size = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    shared: Floats = np.maximum(size, 0).prod(axis=1)
    return shared
