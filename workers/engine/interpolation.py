"""torch's bilinear interpolation along an axis, to the last bit, in NumPy and torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Taps(NamedTuple):
    """The two inputs of each of n outputs of a one-dimensional interpolation: sources (2, n), their weights (2, n)."""

    sources: Ints
    weights: Floats

    def at(self, outputs: Ints) -> Taps:
        """Only those outputs."""
        return Taps(self.sources[:, outputs], self.weights[:, outputs])


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of the two interpolations. Its pixels are grouped into cells; a cell's pixels start from the same logit.

    to_mid, to_pixel: torch's taps of the first and the second step. Cell c holds `sizes[c]` pixels from `starts[c]` on.
    They depend only on the logits c - 1 .. c + taps - 2. Index -1 means the first logit again; an index past the end
    means the last one again. weights: (taps, cells, largest cell). They are NaN where a cell has no such pixel, so
    every comparison there is false.
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
        """How many of the logits have an effect on at least one pixel."""
        return min(self.low, len(self.sizes) + self.taps - 2)


@lru_cache(maxsize=16)
def make_axis(low: int, mid: int, inside: int, pixels: int) -> Axis:
    """Compose the steps low -> mid and mid[:inside] -> pixels."""
    to_mid, to_pixel = bilinear_taps(low, mid), bilinear_taps(inside, pixels)

    # list each pixel's four (logit, weight) pairs; ignore pairs of weight 0, or the cell would need more taps
    steps = to_mid.at(to_pixel.sources)
    logit = steps.sources.reshape(4, pixels)
    weight = (steps.weights * to_pixel.weights.astype(np.float64)).reshape(4, pixels)
    nearest = np.where(weight > 0, logit, low).min(axis=0)
    farthest = np.where(weight > 0, logit, -1).max(axis=0)

    # a pixel's cell is the logit before its centre; the half cell at the start reads the first logit twice
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

    Source: ATen/native/UpSample.h, area_pixel_compute_source_index and guard_index_and_lambda, align_corners=False.
    torch's compiler flags fuse the product and the subtraction, so they are rounded once.
    """
    scale = np.float64(np.float32(size_in) / np.float32(size_out))
    source = np.maximum((scale * (np.arange(size_out) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(source.astype(np.int64), size_in - 1)
    weight = np.clip(source - first.astype(np.float32), np.float32(0), np.float32(1))
    # A source of weight 0 may lie outside the patch. The first source takes its place.
    second = np.where(weight > 0, np.minimum(first + 1, size_in - 1), first)
    return Taps(np.stack([first, second]), np.stack([np.float32(1) - weight, weight]))


def bilinear(corners: Floats, weights_y: Floats, weights_x: Floats) -> Floats:
    """`y0*x0*a + y0*x1*b + y1*x0*c + y1*x1*d`, rounded as in torch's compiled kernel.

    The product with b comes first, then fused multiply-adds with a, c and d. corners: (2, 2, ...), weights: (2, ...)
    each. Source: ATen/native/cpu/UpSampleKernel.cpp; `kernel_is_known` checks it. A product of two float32 is exact in
    float64. The sum is rounded twice, which could matter only in a tie, once in 2**29.
    """
    products = weights_y[:, None] * weights_x[None]
    total: Floats = products[0, 1] * corners[0, 1]
    for corner in ((0, 0), (1, 0), (1, 1)):
        total = (corners[corner].astype(np.float64) * products[corner] + total).astype(np.float32)
    return total


@lru_cache(maxsize=1)
def kernel_is_known() -> bool:
    """Whether this build of torch rounds as `bilinear` and `bilinear_taps` do. If not, torch itself is called."""
    logits = np.random.default_rng(0).normal(scale=5, size=(23, 29)).astype(np.float32)
    size = (67, 101)
    from_y, from_x = (bilinear_taps(*sizes) for sizes in zip(logits.shape, size, strict=True))
    corners = logits[from_y.sources[:, None, :, None], from_x.sources[None, :, None, :]]
    ours = bilinear(corners, from_y.weights[:, :, None], from_x.weights[:, None])
    return bool(np.array_equal(ours, torch_resize(logits, size)))


def resize_batch(batch: Tensor, size_hw: tuple[int, int]) -> Tensor:
    if batch.shape[-2:] == size_hw:
        return batch  # every weight would be 0 or 1
    return F.interpolate(batch, size_hw, mode="bilinear", align_corners=False)


def torch_resize(logits: Floats, size: tuple[int, int]) -> Floats:
    """Resize the logits as one of a batch of three, like the reference. For one channel torch uses another kernel."""
    batch = torch.from_numpy(np.ascontiguousarray(logits)).repeat(1, 3, 1, 1)
    resized: Floats = F.interpolate(batch, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    return resized


def interpolate_lines(lines: Floats, axis: Axis, cells: slice) -> Floats:
    """Interpolate between neighbouring lines (cells + taps - 1, m), along the first dimension: (pixels, m).

    torch's lerp reads and writes the memory once. In NumPy this takes three operations, each with its own pass.
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
