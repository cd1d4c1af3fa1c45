"""Greedy non-maximum suppression of boxes, one candidate at a time. So suppressed candidates need no full computation.

The arithmetic is torchvision's (ops/cpu/nms_kernel.cpp). Boxes are float32. The width is x1 - x0, although our boxes
include both ends. The overlap is compared in double precision. A candidate that is not kept has no effect on others.
So it may be dropped before its exact box is known, when the bounds of its box show that a kept box would suppress it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]

# For more boxes than this, batched_nms uses another method. There equal scores have the order of an unstable sort.
STABLE_UP_TO = 1000
# The bounds are computed in double precision, torchvision's overlaps in single.
ROUNDING = 1e-5


class Suppression:
    """The boxes kept so far. Candidates come by falling score."""

    def __init__(self, iou_threshold: float) -> None:
        self.iou_threshold = iou_threshold
        self._boxes: NDArray[np.float32] = np.zeros((64, 4), np.float32)
        self._kept = 0

    def keep(self, box: Sequence[int]) -> bool:
        """Keep the box, unless an earlier kept box overlaps it by more than the threshold. True if it is kept."""
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
        """Whether every box that contains `inner` and lies inside `outer` would be dropped now."""
        kept = self._boxes[: self._kept]
        at_least = _intersections(kept, np.array(inner, np.float64))
        widest = np.array(outer, np.float64)
        joint = _areas(kept) + _areas(widest) - _intersections(kept, widest)
        return bool((at_least > (self.iou_threshold + ROUNDING) * joint).any())


def order_of_kept(kept: list[int], scores: NDArray[np.float32], survivors: int) -> list[int]:
    """The reference's order of the kept candidates. kept: by falling score, then by index.

    survivors: how many candidates entered the suppression. The reference's order differs only among equal scores, and
    only when survivors is more than STABLE_UP_TO.
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
