"""A mask as the run lengths inside its own box: small in memory, quick to turn into pixels or COCO's string.

Pixels are (x, y), column by column, in the order of COCO's runs. Boxes are inclusive as in the reference: (x0, y0, x1,
y1) of the first and the last pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from workers.masks import BoolMask

InclusiveBox = tuple[int, int, int, int]
"""(x0, y0, x1, y1) of the first and the last pixel: a box of one pixel has x0 == x1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxedRuns:
    """A mask inside its box.

    changes: int64 (2 x runs,). Sorted positions where the mask starts and stops, in turn. A position counts the box's
    pixels column by column. Each column has one extra background pixel at its end, so no run reaches into the next
    column. A mask without pixels has the box (0, 0, 0, 0) and no changes.
    """

    box: InclusiveBox
    changes: NDArray[np.int64]
    area_px: int

    def moved(self, x: int, y: int) -> BoxedRuns:
        """The same mask with its box moved. The box of an empty mask moves too, as in the reference."""
        x0, y0, x1, y1 = self.box
        return replace(self, box=(x0 + x, y0 + y, x1 + x, y1 + y))


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundMask:
    """A mask that passed. crop: the crop in which it was found, (x0, y0, x1, y1), in the frame of the whole image."""

    runs: BoxedRuns
    predicted_iou: float
    stability_score: float
    point_xy: tuple[float, float]
    crop: InclusiveBox

    def in_image(self) -> FoundMask:
        """The same, with its runs and its point moved from the crop's frame to the image's frame."""
        x0, y0 = self.crop[:2]
        x, y = self.point_xy
        return replace(self, runs=self.runs.moved(x0, y0), point_xy=(x + x0, y + y0))


def take_runs(pixels: BoolMask, corner: tuple[int, int]) -> BoxedRuns:
    """Read the runs of pixels (x, y) bool. corner: (x, y) of the first pixel in the frame."""
    y, x, height, width = cv2.boundingRect(pixels.view(np.uint8)) if pixels.size else (0, 0, 0, 0)
    if width == 0:
        return BoxedRuns(box=(0, 0, 0, 0), changes=np.zeros(0, np.int64), area_px=0)
    columns = np.zeros(width * (height + 1) + 1, np.bool_)
    columns[1:].reshape(width, height + 1)[:, :height] = pixels[x : x + width, y : y + height]
    changes = np.flatnonzero(columns[1:] != columns[:-1])
    left, top = corner[0] + x, corner[1] + y
    area_px = int(changes[1::2].sum() - changes[::2].sum())
    return BoxedRuns(box=(left, top, left + width - 1, top + height - 1), changes=changes, area_px=area_px)


def draw_runs(runs: BoxedRuns) -> BoolMask:
    """The pixels of the mask's box: (x, y) bool. Not for the empty mask."""
    x0, y0, x1, y1 = runs.box
    size = (x1 - x0 + 1) * (y1 - y0 + 2)
    lengths = np.diff(runs.changes, prepend=0, append=size)
    columns = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(x1 - x0 + 1, y1 - y0 + 2)
    return columns[:, :-1]


def encode_runs(runs: BoxedRuns, size_hw: tuple[int, int]) -> str:
    """COCO's compressed run lengths of the mask in a frame of (H, W) pixels."""
    height, width = size_hw
    x0, y0, _, y1 = runs.box
    column, row = np.divmod(runs.changes, y1 - y0 + 2)
    changes = (x0 + column) * height + y0 + row
    if y1 - y0 + 1 == height:
        # a run that ends at the bottom of one column continues at the top of the next
        joined = np.flatnonzero(changes[1:-1:2] == changes[2::2]) * 2 + 1
        changes = np.delete(changes, np.concatenate([joined, joined + 1]))
    lengths = np.diff(changes, prepend=0, append=height * width)
    if len(changes) and lengths[-1] == 0:
        lengths = lengths[:-1]
    size = [height, width]
    counts: bytes = coco_mask.frPyObjects({"size": size, "counts": lengths.tolist()}, height, width)["counts"]
    return counts.decode("ascii")
