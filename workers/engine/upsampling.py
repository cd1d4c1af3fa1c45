"""Upsamples SAM's low-resolution logits to the pixels of the image: exactly, and only where it matters.

SAM interpolates twice (256 -> padded 1024 square, crop, -> image), each time with torch's bilinear kernel. So a pixel
is a weighted mean of at most three by three neighbouring logits. Pixels outside the box of the logits above a threshold
need no computation. Inside the box, one combined set of weights gives each pixel's logit up to a few roundings. The few
pixels that are closer to a threshold than that are computed again, in torch's own order of float32 operations. The
masks equal the reference's bit for bit.

Along an axis, `low` counts logits, `mid` the padded square, and `inside` the part of the square that is not padding.
Crops are stored column by column, (x, y), in the order of COCO's run lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

from workers.engine.boxed_runs import InclusiveBox
from workers.engine.interpolation import (
    Axis,
    Floats,
    Ints,
    bilinear,
    interpolate_lines,
    kernel_is_known,
    make_axis,
    resize_batch,
    torch_resize,
)
from workers.masks import BoolMask

# The combined weights and torch's two steps differ by less than 20 roundings (2**-24) of the largest logit. This is 32
# of them.
DOUBT = np.float32(2.0**-19)
# Pixels computed at once: the buffers (two float32 planes, some boolean) stay in a core's 1 MiB second-level cache.
PIXELS_AT_ONCE = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """The part of one mask's logits that can matter: (x, y), with a margin for the taps.

    corner: (x, y) of its first cell. doubt: the largest error of a pixel's logit.
    """

    logits: Floats
    corner: tuple[int, int]
    doubt: np.float32

    def cells(self, x: Axis, y: Axis) -> tuple[slice, slice]:
        """The cells that the patch covers on each axis."""
        across, down = self.logits.shape
        left, top = self.corner
        return slice(left, left + across - x.taps + 1), slice(top, top + down - y.taps + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A mask at full resolution.

    counts: (n,), pixels above each requested threshold. pixels: (x, y) bool, those above the first threshold. corner:
    (x, y) of the first pixel in the frame. The mask has no pixels outside `pixels`.
    """

    counts: Ints
    pixels: BoolMask
    corner: tuple[int, int]


class Upsampling:
    """The map from logits (low_hw) through SAM's padded square to the pixels of one frame (frame_hw)."""

    def __init__(
        self, *, low_hw: tuple[int, int], mid: int, inside_hw: tuple[int, int], frame_hw: tuple[int, int]
    ) -> None:
        self.y = make_axis(low_hw[0], mid, inside_hw[0], frame_hw[0])
        self.x = make_axis(low_hw[1], mid, inside_hw[1], frame_hw[1])
        # the rows and columns of the logits that have an effect on at least one pixel
        self.used_hw = (self.y.used, self.x.used)
        # where the frame is smaller than the logits, some cells lie between two pixels
        self.has_empty_cells = not (self.x.sizes.all() and self.y.sizes.all())
        self.frame_hw = frame_hw
        self._low_hw, self._mid, self._inside_hw = low_hw, mid, inside_hw

    def frames(self, logits: Tensor) -> Tensor:
        """Upsample logits (n, h, w) by torch's own kernels on their device, like the reference: (n, H, W) float32.

        n must be at least 2: for a single mask torch uses another kernel on the CPU.
        """
        square = resize_batch(logits.float()[None], (self._mid, self._mid))
        height, width = self._inside_hw
        return resize_batch(square[..., :height, :width], self.frame_hw)[0]

    def frame_bytes(self) -> int:
        """The bytes of the float32 buffers of `frames` for one mask."""
        return 4 * (self._mid**2 + self.frame_hw[0] * self.frame_hw[1])

    def patch(self, logits: Floats, threshold: float) -> Patch | None:
        """Cut out the part of logits (h, w) where a pixel of the frame can exceed `threshold`. None if no pixel can.

        Raises FloatingPointError when a logit is not finite.
        """
        seen = logits[: self.used_hw[0], : self.used_hw[1]]
        peak = max(seen.max(), -seen.min())
        if not np.isfinite(peak):
            raise FloatingPointError("a mask logit is not a finite number")
        doubt = peak * DOUBT
        left, top, width, height = cv2.boundingRect((seen > np.float32(threshold) - doubt).view(np.uint8))
        if width == 0:
            return None
        corner_x, columns = _reach(self.x, left, left + width - 1)
        corner_y, rows = _reach(self.y, top, top + height - 1)
        patch = Patch(logits=seen[rows][:, columns].T.copy(), corner=(corner_x, corner_y), doubt=doubt)
        across, down = patch.cells(self.x, self.y)
        is_between_pixels = self.has_empty_cells and not (self.x.sizes[across].any() and self.y.sizes[down].any())
        return None if is_between_pixels else patch

    def box_bounds(self, patch: Patch, threshold: float) -> tuple[InclusiveBox | None, InclusiveBox | None]:
        """Two inclusive boxes (inner, outer). The mask's box surely contains `inner` and surely lies inside `outer`."""
        within = patch.logits > np.float32(threshold) + patch.doubt
        touched = patch.logits > np.float32(threshold) - patch.doubt
        for axis, taps in enumerate((self.x.taps, self.y.taps)):
            within, touched = _window(np.logical_and, within, taps, axis), _window(np.logical_or, touched, taps, axis)
        return self._pixel_box(patch, within), self._pixel_box(patch, touched)

    def cut(self, patch: Patch, thresholds: tuple[float, ...]) -> Cut:
        """Compare the patch's pixels with each threshold, exactly. Returns the pixels above the first threshold."""
        across, down = patch.cells(self.x, self.y)
        columns = interpolate_lines(np.ascontiguousarray(patch.logits.T), self.y, down)
        lines = np.asarray(cv2.transpose(columns), np.float32).reshape(columns.shape[::-1])
        counts = np.zeros(len(thresholds), np.int64)
        parts: list[BoolMask] = []
        doubtful: list[tuple[int, Ints]] = []
        step = max(1, PIXELS_AT_ONCE // (lines.shape[1] * self.x.weights.shape[2]))
        for first in range(across.start, across.stop, step):
            part = slice(first, min(first + step, across.stop))
            read = slice(first - across.start, part.stop - across.start + self.x.taps - 1)
            values = interpolate_lines(lines[read], self.x, part)
            begin = int(self.x.starts[first] - self.x.starts[across.start]) * lines.shape[1]
            for number, threshold in enumerate(thresholds):
                surely, unsure, count = _compare(values, np.float32(threshold), patch.doubt)
                counts[number] += count
                doubtful += [(number, unsure + begin)] if len(unsure) else []
                parts += [surely] if number == 0 else []
        corner = (int(self.x.starts[across.start]), int(self.y.starts[down.start]))
        cut = Cut(counts=counts, pixels=parts[0] if len(parts) == 1 else np.concatenate(parts), corner=corner)
        self._settle(cut, doubtful, patch=patch, thresholds=thresholds)
        return cut

    def _settle(
        self, cut: Cut, doubtful: list[tuple[int, Ints]], *, patch: Patch, thresholds: tuple[float, ...]
    ) -> None:
        """Decide the doubtful pixels in torch's arithmetic. doubtful: (threshold's number, places in cut.pixels)."""
        if not doubtful:
            return
        number = np.concatenate([np.full(len(places), number) for number, places in doubtful])
        place = np.concatenate([places for _, places in doubtful])
        x, y = np.divmod(place, cut.pixels.shape[1])
        exact = self.exact_logits(patch, x + cut.corner[0], y + cut.corner[1])
        above = exact > np.array(thresholds, np.float32)[number]
        np.add.at(cut.counts, number, above)
        cut.pixels.reshape(-1)[place[number == 0]] = above[number == 0]

    def exact_logits(self, patch: Patch, x: Ints, y: Ints) -> Floats:
        """The reference's float32 logits at pixels (x, y) of the frame: (n,)."""
        if not kernel_is_known():
            return self._logits_by_torch(patch)[y, x]
        from_x, from_y = self.x.to_pixel.at(x), self.y.to_pixel.at(y)
        mid = self._mid_logits(patch, from_x.sources, from_y.sources)
        return bilinear(mid, from_y.weights, from_x.weights)

    def _mid_logits(self, patch: Patch, x: Ints, y: Ints) -> Floats:
        """The first step's result at x (2, n) and y (2, n) of the padded square: (2, 2, n), y first."""
        from_x, from_y = self.x.to_mid.at(x[None]), self.y.to_mid.at(y[:, None])
        left, top = patch.corner[0] - 1, patch.corner[1] - 1
        corners = patch.logits[from_x.sources[None] - left, from_y.sources[:, None] - top]
        return bilinear(corners, from_y.weights, from_x.weights)

    def _logits_by_torch(self, patch: Patch) -> Floats:
        """All logits (H, W) from torch's own kernel, valid only at the patch's pixels.

        For builds of torch that do not use the order of operations written down here.
        """
        whole = np.zeros(self._low_hw, np.float32)
        indices = [np.arange(n) + start - 1 for n, start in zip(patch.logits.shape, patch.corner, strict=True)]
        x, y = (index.clip(0, n - 1) for index, n in zip(indices, self._low_hw[::-1], strict=True))
        whole[np.ix_(y, x)] = patch.logits.T
        square = torch_resize(whole, (self._mid, self._mid))
        return torch_resize(square[: self._inside_hw[0], : self._inside_hw[1]], self.frame_hw)

    def _pixel_box(self, patch: Patch, cells: BoolMask) -> InclusiveBox | None:
        """The inclusive box (x0, y0, x1, y1) of the pixels of cells (x, y) that are set."""
        across, down = patch.cells(self.x, self.y)
        if self.has_empty_cells:
            cells &= (self.x.sizes[across, None] > 0) & (self.y.sizes[down] > 0)
        y, x, height, width = cv2.boundingRect(cells.view(np.uint8))
        if width == 0:
            return None
        x0, x1, y0, y1 = across.start + x, across.start + x + width - 1, down.start + y, down.start + y + height - 1
        right, bottom = self.x.starts[x1] + self.x.sizes[x1] - 1, self.y.starts[y1] + self.y.sizes[y1] - 1
        return int(self.x.starts[x0]), int(self.y.starts[y0]), int(right), int(bottom)


def _compare(values: Floats, threshold: np.float32, doubt: np.float32) -> tuple[BoolMask, Ints, int]:
    """(values surely above the threshold, places of other values that may be above it, how many surely are)."""
    surely, perhaps = values > threshold + doubt, values > threshold - doubt
    count = np.count_nonzero(surely)
    if count == np.count_nonzero(perhaps):
        return surely, np.zeros(0, np.int64), count
    return surely, np.flatnonzero(surely ^ perhaps), count


def _reach(axis: Axis, first: int, last: int) -> tuple[int, slice | Ints]:
    """The cells that read logits first..last: (the first of these cells, all logits that they read)."""
    start = max(first - axis.taps + 2, 0)
    read = slice(start - 1, min(last + 2, len(axis.sizes)) + axis.taps - 2)
    if read.start >= 0 and read.stop <= axis.low:
        return start, read
    return start, np.arange(read.start, read.stop).clip(0, axis.low - 1)


def _window(combine: np.ufunc, values: BoolMask, taps: int, axis: int) -> BoolMask:
    """Combine every `taps` neighbours along an axis."""
    size = values.shape[axis] - taps + 1
    runs = [values[i : i + size] if axis == 0 else values[:, i : i + size] for i in range(taps)]
    combined: BoolMask = combine(runs[0], runs[1])
    return combined if taps == 2 else combine(combined, runs[2])
