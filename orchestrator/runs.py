"""Masks as run edges: sorted flat positions where a mask begins and ends, in COCO's column-major order.

Everything here costs by the number of runs or the size of the mask's box, not by the size of the frame: a mask of a
12-megapixel photo usually fills a few per cent of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.masks import BoolMask

Edges = NDArray[np.int64]
"""(2n,) strictly increasing: start, end (exclusive), start, end, … of the runs; position = column * height + row."""

# 5 bits a character; a count of a frame below 2**31 pixels needs 7 with its sign.
_MAX_CHARS_A_COUNT = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A mask's pixels inside its bounding box.

    columns: (w, h) uint8, 0 or 1, C-contiguous: row i is the image's column left + i. left, top: pixels in the frame.
    """

    columns: NDArray[np.uint8]
    left: int
    top: int


def edges_from_counts(counts: str, size_hw: tuple[int, int]) -> Edges:
    """Read COCO compressed run lengths into edges. Source: cocoapi maskApi.c, rleFrString.

    Raises ValueError when the text is not such a string or does not add up to the frame.
    """
    lengths = _parse_counts(counts)
    pixels = size_hw[0] * size_hw[1]
    if (lengths < 0).any() or (lengths > pixels).any() or int(lengths.sum()) != pixels:
        raise ValueError(f"counts {counts[:20]!r}…: do not add up to {size_hw[0]} x {size_hw[1]} pixels")
    # Counts alternate from background on, so after an odd number of them the frame ends in background.
    return without_empty_runs(np.cumsum(lengths)[: lengths.size - lengths.size % 2])


def edges_from_pixels(pixels: BoolMask) -> Edges:
    """Find the edges of an (H, W) bool mask."""
    return flat_edges(pixels.T.ravel())


def flat_edges(flags: NDArray[np.bool_] | NDArray[np.uint8]) -> Edges:
    """Find where a flat array of 0 and 1, (n,) bool or uint8, starts and stops being 1."""
    if flags.size == 0:
        return np.zeros(0, np.int64)
    inner = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    head = [0] if flags[0] else []
    tail = [flags.size] if flags[-1] else []
    return np.concatenate((head, inner, tail)).astype(np.int64)


def pixels_from_edges(edges: Edges, size_hw: tuple[int, int]) -> BoolMask:
    """Paint edges as (H, W) bool, in Fortran order."""
    height, width = size_hw
    return paint(edges, height * width).view(np.bool_).reshape(width, height).T


def crop_edges(edges: Edges, size_hw: tuple[int, int]) -> Crop:
    """Paint edges into their bounding box only. edges must not be empty."""
    height = size_hw[0]
    last = edges.copy()
    last[1::2] -= 1
    column = last // height
    row = last - column * height
    # A run that goes on into the next column touches the frame's bottom and top.
    tall = bool((column[0::2] != column[1::2]).any())
    top, bottom = (0, height) if tall else (int(row.min()), int(row.max()) + 1)
    left, box_width, box_height = int(column[0]), int(column[-1] - column[0]) + 1, bottom - top
    inside = (column - left) * box_height + row - top
    inside[1::2] += 1
    columns = paint(inside, box_width * box_height).reshape(box_width, box_height)
    return Crop(columns=columns, left=left, top=top)


def area_px(edges: Edges) -> int:
    """Count the pixels inside."""
    return int((edges[1::2] - edges[0::2]).sum())


def run_iou(a: Edges, b: Edges) -> float:
    """Intersection over union of two masks of one frame, 0..1; two empty masks agree, 1."""
    stride = int(max(a[-1:].sum(), b[-1:].sum())) + 1
    return float(run_ious(a, b, stride=stride, count=1)[0])


def run_ious(a: Edges, b: Edges, *, stride: int, count: int) -> NDArray[np.float64]:
    """Intersection over union of `count` pairs of masks at once, (count,) 0..1.

    The edges of pair n are laid off by n * stride, which is larger than the frame, so that no runs of two masks touch.
    """
    lengths = a[1::2] - a[0::2]
    area_a = np.bincount(a[0::2] // stride, weights=lengths, minlength=count)
    area_b = np.bincount(b[0::2] // stride, weights=b[1::2] - b[0::2], minlength=count)
    both: NDArray[np.float64] = np.zeros(count)
    if a.size and b.size:
        # The number of a's pixels before a position is linear between a's edges, so b's edges only read it off.
        counted = np.empty(a.size, np.int64)
        counted[1::2] = lengths.cumsum()
        counted[0::2] = counted[1::2] - lengths
        before = np.interp(b, a, counted)
        both = np.bincount(b[0::2] // stride, weights=before[1::2] - before[0::2], minlength=count).astype(np.float64)
    union = area_a + area_b - both
    return np.divide(both, union, out=np.ones(count), where=union > 0)


def paint(edges: Edges, size: int) -> NDArray[np.uint8]:
    """(size,) uint8: 1 inside the runs. Edges may repeat, where one run ends and the next begins."""
    values = np.zeros(edges.size + 1, np.uint8)
    values[1::2] = 1
    return values.repeat(run_lengths(edges, size))


def run_lengths(edges: Edges, size: int) -> NDArray[np.int64]:
    """(2n + 1,) lengths outside, inside, …, outside; 0 where a run touches an end of the frame of `size` pixels."""
    bounds = np.empty(edges.size + 2, np.int64)
    bounds[0], bounds[1:-1], bounds[-1] = 0, edges, size
    return bounds[1:] - bounds[:-1]


def _parse_counts(counts: str) -> NDArray[np.int64]:
    chars = np.frombuffer(counts.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((chars & 32) == 0)
    if chars.size == 0 or chars.min() < 0 or chars.max() > 63 or ends.size == 0 or ends[-1] != chars.size - 1:
        raise ValueError(f"counts {counts[:20]!r}…: not a COCO run-length string")
    widths = ends.copy()
    widths[0] += 1
    widths[1:] -= ends[:-1]
    if widths.max() > _MAX_CHARS_A_COUNT:
        raise ValueError(f"counts {counts[:20]!r}…: one count takes {widths.max()} characters, more than a frame needs")

    # Assemble each count from its 5-bit groups, the low ones first, and extend its sign.
    starts = ends - widths + 1
    shifts = 5 * (np.arange(chars.size) - starts.repeat(widths))
    lengths: NDArray[np.int64] = np.add.reduceat((chars & 31) << shifts, starts)
    lengths -= ((chars[ends] & 16) >> 4) << (5 * widths)

    # From the fourth on, a count is stored as the difference with the one two places before.
    lengths[1::2] = lengths[1::2].cumsum()
    lengths[2::2] = lengths[2::2].cumsum()
    return lengths


def without_empty_runs(edges: Edges) -> Edges:
    """Cancel sorted edges that fall on one place: a run of length 0, or one that begins where the last ended."""
    changes = edges[1:] != edges[:-1]
    if changes.all():
        return edges
    first = np.flatnonzero(np.concatenate(([True], changes)))
    times = np.diff(first, append=edges.size)
    odd: Edges = edges[first[times % 2 == 1]]
    return odd
