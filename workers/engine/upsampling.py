"""How SAM carries a decoder's low-resolution logits to the pixels of the image: exactly, and only where it matters.

SAM interpolates twice (256 -> padded 1024 square, crop, -> image), each time with torch's bilinear kernel. A pixel is
a weighted mean of at most three by three neighbouring logits, so nothing outside the box of the logits above a
threshold needs evaluation. Inside, one composed set of weights gives each logit to within a few roundings; the few
pixels closer to a threshold than that are evaluated again in torch's own order of float32 operations. The masks are
the reference's, bit for bit.

Along an axis, `low` counts logits, `mid` the padded square and `inside` its part that is not padding. Crops are held
column by column, (x, y), as COCO's run lengths want them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from workers.masks import BoolMask

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Box = tuple[int, int, int, int]

# The composed weights and torch's two chains of products differ by less than 20 roundings (2**-24) of the largest
# logit; this is 32 of them.
DOUBT = np.float32(2.0**-19)
# Pixels evaluated in one go: the buffers (two float32 planes, some boolean) stay in a core's 1 MiB second-level cache.
PIXELS_AT_ONCE = 1 << 17


class Taps(NamedTuple):
    """Where each of n outputs of a one-dimensional interpolation comes from: sources (2, n), their weights (2, n)."""

    sources: Ints
    weights: Floats

    def at(self, outputs: Ints) -> Taps:
        """Only those outputs."""
        return Taps(self.sources[:, outputs], self.weights[:, outputs])


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of the two interpolations, its pixels cut into cells that start from the same logit.

    to_mid, to_pixel: torch's taps of the first and the second step. Cell c holds `sizes[c]` pixels from `starts[c]`;
    they depend on the logits c - 1 .. c + taps - 2 and no others, where -1 repeats the first logit and the tail
    repeats the last. weights: (taps, cells, largest cell), NaN where a cell has no such pixel, so that no comparison
    there is ever true.
    """

    low: int
    to_mid: Taps
    to_pixel: Taps
    taps: int
    starts: Ints
    sizes: Ints
    weights: Floats

    @property
    def used(self) -> int:
        """How many of the logits any pixel depends on."""
        return min(self.low, len(self.sizes) + self.taps - 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """The part of one mask's logits that can matter, (x, y) with its margin of taps, from cell (x, y) `corner` on."""

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
    """A mask at full resolution. counts: pixels above each threshold asked, (n,). pixels: (x, y) bool, those above the
    first, whose first pixel is `corner` (x, y) in the frame; outside of it there are none."""

    counts: Ints
    pixels: BoolMask
    corner: tuple[int, int]


class Upsampling:
    """The map from logits (low_hw) to the pixels of one frame (frame_hw), by way of SAM's padded square."""

    def __init__(
        self, *, low_hw: tuple[int, int], mid: int, inside_hw: tuple[int, int], frame_hw: tuple[int, int]
    ) -> None:
        self.y = make_axis(low_hw[0], mid, inside_hw[0], frame_hw[0])
        self.x = make_axis(low_hw[1], mid, inside_hw[1], frame_hw[1])
        # rows and columns of the logits that any pixel depends on
        self.used_hw = (self.y.used, self.x.used)
        # where the frame is smaller than the logits, some lie between two pixels
        self.has_empty_cells = not (self.x.sizes.all() and self.y.sizes.all())
        self.frame_hw = frame_hw
        self._low_hw, self._mid, self._inside_hw = low_hw, mid, inside_hw

    def frames(self, logits: Tensor) -> Tensor:
        """Every pixel of logits (n, h, w) by torch's own kernels on their device, as the reference has them: (n, H, W)
        float32. At least two at once: for a single one torch takes another kernel on the CPU."""
        square = _interpolated(logits.float()[None], (self._mid, self._mid))
        height, width = self._inside_hw
        return _interpolated(square[..., :height, :width], self.frame_hw)[0]

    def frame_bytes(self) -> int:
        """The float32 buffers of `frames` for one mask."""
        return 4 * (self._mid**2 + self.frame_hw[0] * self.frame_hw[1])

    def patch(self, logits: Floats, threshold: float) -> Patch | None:
        """Cut out of logits (h, w) what can reach above `threshold` anywhere in the frame; None when nothing can.

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

    def box_bounds(self, patch: Patch, threshold: float) -> tuple[Box | None, Box | None]:
        """(inner, outer): inclusive boxes that the mask's box surely contains, and surely lies in."""
        within = patch.logits > np.float32(threshold) + patch.doubt
        touched = patch.logits > np.float32(threshold) - patch.doubt
        for axis, taps in enumerate((self.x.taps, self.y.taps)):
            within, touched = _window(np.logical_and, within, taps, axis), _window(np.logical_or, touched, taps, axis)
        return self._pixel_box(patch, within), self._pixel_box(patch, touched)

    def cut(self, patch: Patch, thresholds: tuple[float, ...]) -> Cut:
        """Compare the patch's pixels with each threshold, exactly; the pixels themselves are those above the first."""
        across, down = patch.cells(self.x, self.y)
        columns = _interpolate(np.ascontiguousarray(patch.logits.T), self.y, down)
        lines = np.asarray(cv2.transpose(columns), np.float32).reshape(columns.shape[::-1])
        counts = np.zeros(len(thresholds), np.int64)
        parts: list[BoolMask] = []
        doubtful: list[tuple[int, Ints]] = []
        step = max(1, PIXELS_AT_ONCE // (lines.shape[1] * self.x.weights.shape[2]))
        for first in range(across.start, across.stop, step):
            part = slice(first, min(first + step, across.stop))
            read = slice(first - across.start, part.stop - across.start + self.x.taps - 1)
            values = _interpolate(lines[read], self.x, part)
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
        """Decide the doubtful pixels, (threshold's number, places in cut.pixels) each, in torch's arithmetic."""
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
        if not _kernel_is_known():
            return self._logits_by_torch(patch)[y, x]
        from_x, from_y = self.x.to_pixel.at(x), self.y.to_pixel.at(y)
        mid = self._mid_logits(patch, from_x.sources, from_y.sources)
        return _bilinear(mid, from_y.weights, from_x.weights)

    def _mid_logits(self, patch: Patch, x: Ints, y: Ints) -> Floats:
        """The first step's result at x (2, n) and y (2, n) of the padded square: (2, 2, n), y first."""
        from_x, from_y = self.x.to_mid.at(x[None]), self.y.to_mid.at(y[:, None])
        left, top = patch.corner[0] - 1, patch.corner[1] - 1
        corners = patch.logits[from_x.sources[None] - left, from_y.sources[:, None] - top]
        return _bilinear(corners, from_y.weights, from_x.weights)

    def _logits_by_torch(self, patch: Patch) -> Floats:
        """All logits (H, W) from torch's own kernel, valid at the patch's pixels; for builds of torch whose order of
        operations is not the one written down here."""
        whole = np.zeros(self._low_hw, np.float32)
        indices = [np.arange(n) + start - 1 for n, start in zip(patch.logits.shape, patch.corner, strict=True)]
        x, y = (index.clip(0, n - 1) for index, n in zip(indices, self._low_hw[::-1], strict=True))
        whole[np.ix_(y, x)] = patch.logits.T
        square = _torch_resize(whole, (self._mid, self._mid))
        return _torch_resize(square[: self._inside_hw[0], : self._inside_hw[1]], self.frame_hw)

    def _pixel_box(self, patch: Patch, cells: BoolMask) -> Box | None:
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


@lru_cache(maxsize=16)
def make_axis(low: int, mid: int, inside: int, pixels: int) -> Axis:
    """Compose the steps low -> mid and mid[:inside] -> pixels."""
    to_mid, to_pixel = bilinear_taps(low, mid), bilinear_taps(inside, pixels)

    # list each pixel's four (logit, weight) pairs; those of weight 0 must not widen its reach
    steps = to_mid.at(to_pixel.sources)
    logit = steps.sources.reshape(4, pixels)
    weight = (steps.weights * to_pixel.weights.astype(np.float64)).reshape(4, pixels)
    nearest = np.where(weight > 0, logit, low).min(axis=0)
    farthest = np.where(weight > 0, logit, -1).max(axis=0)

    # cut at the logit before each pixel's centre; the half cell at the head reads the repeated first logit
    centre = (np.arange(pixels) + 0.5) * (inside / pixels) * (low / mid) - 0.5
    first = np.minimum(np.floor(centre).astype(np.int64), nearest)
    sizes = np.bincount(first + 1)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    taps = max(2, int((farthest - first).max()) + 1)

    weights = np.full((taps, len(sizes), int(sizes.max())), np.nan)
    slot = np.arange(pixels) - starts[first + 1]
    weights[:, first + 1, slot] = 0
    np.add.at(weights, (np.where(weight > 0, logit - first, 0), first + 1, slot), weight)
    composed = weights.astype(np.float32)
    return Axis(low=low, to_mid=to_mid, to_pixel=to_pixel, taps=taps, starts=starts, sizes=sizes, weights=composed)


def bilinear_taps(size_in: int, size_out: int) -> Taps:
    """torch's sources of each output position.

    Source: ATen/native/UpSample.h, area_pixel_compute_source_index and guard_index_and_lambda, align_corners=False;
    the product and the subtraction are contracted into one rounding by torch's compiler flags.
    """
    scale = np.float64(np.float32(size_in) / np.float32(size_out))
    source = np.maximum((scale * (np.arange(size_out) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(source.astype(np.int64), size_in - 1)
    weight = np.clip(source - first.astype(np.float32), np.float32(0), np.float32(1))
    # A source of weight 0 may lie beyond what a patch holds; any other stands for it.
    second = np.where(weight > 0, np.minimum(first + 1, size_in - 1), first)
    return Taps(np.stack([first, second]), np.stack([np.float32(1) - weight, weight]))


def _bilinear(corners: Floats, weights_y: Floats, weights_x: Floats) -> Floats:
    """`y0*x0*a + y0*x1*b + y1*x0*c + y1*x1*d` as torch's compiled kernel rounds it: b first, then fused
    multiply-adds of a, c and d. corners: (2, 2, ...), weights: (2, ...) each.

    Source: ATen/native/cpu/UpSampleKernel.cpp, held by `_kernel_is_known`. A product of two float32 is exact in
    float64; the sum's second rounding could matter only in a tie, once in 2**29.
    """
    products = weights_y[:, None] * weights_x[None]
    total: Floats = products[0, 1] * corners[0, 1]
    for corner in ((0, 0), (1, 0), (1, 1)):
        total = (corners[corner].astype(np.float64) * products[corner] + total).astype(np.float32)
    return total


@lru_cache(maxsize=1)
def _kernel_is_known() -> bool:
    """Whether this build of torch rounds as `_bilinear` and `bilinear_taps` say; if not, torch is asked each time."""
    logits = np.random.default_rng(0).normal(scale=5, size=(23, 29)).astype(np.float32)
    size = (67, 101)
    from_y, from_x = (bilinear_taps(*sizes) for sizes in zip(logits.shape, size, strict=True))
    corners = logits[from_y.sources[:, None, :, None], from_x.sources[None, :, None, :]]
    ours = _bilinear(corners, from_y.weights[:, :, None], from_x.weights[:, None])
    return bool(np.array_equal(ours, _torch_resize(logits, size)))


def _interpolated(batch: Tensor, size_hw: tuple[int, int]) -> Tensor:
    if batch.shape[-2:] == size_hw:
        return batch  # every weight would be 0 or 1
    return F.interpolate(batch, size_hw, mode="bilinear", align_corners=False)


def _torch_resize(logits: Floats, size: tuple[int, int]) -> Floats:
    """As one of a batch of three, like the reference's: for a single channel torch takes another kernel."""
    batch = torch.from_numpy(np.ascontiguousarray(logits)).repeat(1, 3, 1, 1)
    resized: Floats = F.interpolate(batch, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    return resized


def _interpolate(lines: Floats, axis: Axis, cells: slice) -> Floats:
    """Weigh neighbouring lines (cells + taps - 1, m) into the pixels of cells along the first dimension: (pixels, m).

    In torch, whose lerp reads and writes once where NumPy's three operations do so three times.
    """
    sources, weights = torch.from_numpy(lines)[:, None], torch.from_numpy(axis.weights[:, cells, :, None])
    count = weights.shape[1]
    if axis.taps == 2:
        values = torch.lerp(sources[:count], sources[1:], weights[1])
    else:
        values = sources[:count] * weights[0]
        for tap in range(1, axis.taps):
            values.addcmul_(sources[tap : tap + count], weights[tap])
    present = np.arange(weights.shape[2]) < axis.sizes[cells, None]
    pixels: Floats = values.numpy()
    return pixels.reshape(-1, lines.shape[1]) if present.all() else pixels[present]


def _compare(values: Floats, threshold: np.float32, doubt: np.float32) -> tuple[BoolMask, Ints, int]:
    """(values surely above the threshold, places of others that may be, how many surely are)."""
    surely, perhaps = values > threshold + doubt, values > threshold - doubt
    count = np.count_nonzero(surely)
    if count == np.count_nonzero(perhaps):
        return surely, np.zeros(0, np.int64), count
    return surely, np.flatnonzero(surely ^ perhaps), count


def _reach(axis: Axis, first: int, last: int) -> tuple[int, slice | Ints]:
    """The cells that read logits first..last: (the first of them, every logit they read)."""
    start = max(first - axis.taps + 2, 0)
    read = slice(start - 1, min(last + 2, len(axis.sizes)) + axis.taps - 2)
    if read.start >= 0 and read.stop <= axis.low:
        return start, read
    return start, np.arange(read.start, read.stop).clip(0, axis.low - 1)


def _window(combine: np.ufunc, values: BoolMask, taps: int, axis: int) -> BoolMask:
    """Combine each run of `taps` neighbours along an axis."""
    size = values.shape[axis] - taps + 1
    runs = [values[i : i + size] if axis == 0 else values[:, i : i + size] for i in range(taps)]
    combined: BoolMask = combine(runs[0], runs[1])
    return combined if taps == 2 else combine(combined, runs[2])
