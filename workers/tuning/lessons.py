"""One image's masks as what the decoder learns from: targets on the grid of its logits, boxes, and wrong prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.masks import BoolMask

Cover = NDArray[np.float32]  # the share 0..1 of each cell of the logits' grid that an object covers
BoxXyxy = tuple[float, float, float, float]
Pixels = TypeVar("Pixels", bound=np.generic)


NEAR_SIDE = 48  # cells of the finer grid on a side
_MARGIN, _MARGIN_CELLS = 0.3, 2.0  # around an object's box, in its sides and in cells of the logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """An image in the frames of its model.

    size_hw: the upright image. input_hw: the image at the encoder's input, before padding. grid_hw: the logits of the
    padded input. cell_px: the side of a cell of this grid, in pixels of the encoder's input.
    """

    size_hw: tuple[int, int]
    input_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    cell_px: int

    @property
    def scale_xy(self) -> tuple[float, float]:
        """From pixels of the image to pixels of the encoder's input."""
        return self.input_hw[1] / self.size_hw[1], self.input_hw[0] / self.size_hw[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One object. Only its own part of the grid is kept: whole grids of 100,000 objects would fill a machine.

    patch: (h, w) uint8, the covered share of each cell, 0..255. corner_yx: the patch's first cell. box_xyxy: around the
    object, in pixels of the encoder's input. near: (NEAR_SIDE, NEAR_SIDE) uint8, the covered shares of a finer grid
    over near_xyxy, a window around the object, in pixels of the encoder's input. A nucleus may be smaller than a cell.
    """

    patch: NDArray[np.uint8]
    corner_yx: tuple[int, int]
    box_xyxy: BoxXyxy
    near: NDArray[np.uint8]
    near_xyxy: BoxXyxy

    def cover(self, grid_hw: tuple[int, int]) -> Cover:
        """The object on the whole grid: (H, W) float32, 0..1."""
        whole = np.zeros(grid_hw, np.float32)
        y, x = self.corner_yx
        height, width = self.patch.shape
        whole[y : y + height, x : x + width] = self.patch.astype(np.float32) / 255
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongPrompt:
    """A prompt, in pixels of the encoder's input, whose mask a person deleted: a point (x, y), or a box."""

    point_xy: tuple[float, float] | None = None
    box_xyxy: BoxXyxy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What one image teaches. number: its place among the assets. view: which turned copy of it (`turned`)."""

    number: int
    frame: Frame
    targets: Sequence[Target]
    wrong: Sequence[WrongPrompt] = ()
    view: int = 0


def turned(pixels: NDArray[Pixels], view: int) -> NDArray[Pixels]:
    """An image or a mask, turned by view % 4 quarters of a circle; from 4 on also mirrored. 0 is the image itself."""
    quarters = np.rot90(pixels, view % 4)
    return np.ascontiguousarray(quarters[:, ::-1] if view >= 4 else quarters)


def target_of(mask: BoolMask, frame: Frame) -> Target | None:
    """The target of a mask (H, W) bool in the image's frame. None for a mask without pixels."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    if width == 0:
        return None
    scale_x, scale_y = frame.scale_xy
    box = (x * scale_x, y * scale_y, (x + width) * scale_x, (y + height) * scale_y)
    cover = _cover(mask, frame)
    rows, columns = np.flatnonzero(cover.any(axis=1)), np.flatnonzero(cover.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    patch = cover[top : rows[-1] + 1, left : columns[-1] + 1]
    near, near_xyxy = _look_near(mask, box, frame)
    return Target(patch=patch, corner_yx=(top, left), box_xyxy=box, near=near, near_xyxy=near_xyxy)


def _look_near(mask: BoolMask, box: BoxXyxy, frame: Frame) -> tuple[NDArray[np.uint8], BoxXyxy]:
    """The window around an object's box, and the covered shares of its finer grid. It ends where the image ends."""
    (height, width), (scale_x, scale_y) = mask.shape, frame.scale_xy
    margin = _MARGIN_CELLS * frame.cell_px
    wide, high = _MARGIN * (box[2] - box[0]) + margin, _MARGIN * (box[3] - box[1]) + margin
    x0, x1 = max(0, int((box[0] - wide) / scale_x)), min(width, int((box[2] + wide) / scale_x) + 1)
    y0, y1 = max(0, int((box[1] - high) / scale_y)), min(height, int((box[3] + high) / scale_y) + 1)
    window = mask[y0:y1, x0:x1].astype(np.float32) * 255
    # AREA would repeat pixels where the finer grid has more cells than the window has pixels.
    is_smaller = min(window.shape) < NEAR_SIDE
    shares = cv2.resize(
        window, (NEAR_SIDE, NEAR_SIDE), interpolation=cv2.INTER_LINEAR if is_smaller else cv2.INTER_AREA
    )
    return np.rint(shares).astype(np.uint8), (x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y)


def _cover(mask: BoolMask, frame: Frame) -> NDArray[np.uint8]:
    """The covered share 0..255 of each cell that the image reaches. The largest cell is at least 1."""
    columns, rows = (-(-side // frame.cell_px) for side in frame.input_hw[::-1])
    # A share of the last row or column lies in the padding. It is resampled with the image's own pixels all the same.
    shares = cv2.resize(mask.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
    cover: NDArray[np.uint8] = np.rint(shares * 255).astype(np.uint8)
    if not cover.any():
        cover.flat[int(shares.argmax())] = 1
    return cover
