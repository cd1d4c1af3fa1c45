"""Masks as run edges: sorted flat positions where a mask begins and ends, in COCO's column-major order.

The time of most functions here grows with the number of runs or the size of the mask's box, not with the size of the
frame. A mask usually fills only a few per cent of a 12-megapixel photo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.masks import BoolMask

Edges = NDArray[np.int64]
"""(2n,) strictly increasing: start, end (exclusive), start, end, … of the runs; position = column * height + row."""

# A character holds 5 bits. A count in a frame of less than 2**31 pixels needs 7 characters with its sign.
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
    """Read COCO compressed run lengths into edges. Raises the errors of `edges_of_masks`."""
    return edges_of_masks([counts], size_hw)[0]


def edges_of_masks(counts: Sequence[str], size_hw: tuple[int, int]) -> list[Edges]:
    """Read COCO compressed run lengths of many masks of one frame. Source: cocoapi maskApi.c, rleFrString.

    Raises ValueError when a text is not such a string, or when its counts do not add up to the frame.
    """
    if not counts:
        return []
    lengths, ends = _parse_counts(counts)
    pixels = size_hw[0] * size_hw[1]
    starts = np.concatenate(([0], ends[:-1]))
    wrong = (lengths < 0) | (lengths > pixels)
    if wrong.any() or (np.add.reduceat(lengths, starts) != pixels).any():
        ranges = zip(counts, starts, ends, strict=True)
        bad = next(text for text, i, j in ranges if wrong[i:j].any() or int(lengths[i:j].sum()) != pixels)
        raise ValueError(f"counts {bad[:20]!r}…: do not add up to {size_hw[0]} x {size_hw[1]} pixels")
    positions = lengths.cumsum()
    # Counts alternate and start with background. So after an odd number of counts the frame ends with background.
    bounds = zip(starts.tolist(), (ends - (ends - starts) % 2).tolist(), strict=True)
    return [without_empty_runs(positions[i:j] - n * pixels) for n, (i, j) in enumerate(bounds)]


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
    return crops_of_masks([edges], size_hw)[0]


def crops_of_masks(masks: Sequence[Edges], size_hw: tuple[int, int]) -> list[Crop]:
    """Paint many masks of one frame, each into its bounding box only. None of them may be empty."""
    if not masks:
        return []
    height = size_hw[0]
    ends = np.cumsum([edges.size for edges in masks])
    starts = np.concatenate(([0], ends[:-1]))
    last = np.concatenate(masks)
    last[1::2] -= 1
    column = last // height
    row = last - column * height
    # A run that continues into the next column touches the frame's bottom and top.
    tall = np.add.reduceat(column[1::2] - column[0::2], starts // 2) > 0
    top = np.where(tall, 0, np.minimum.reduceat(row, starts))
    box_height = np.where(tall, height, np.maximum.reduceat(row, starts) + 1) - top
    left = column[starts]
    box_width = column[ends - 1] - left + 1

    sizes = box_width * box_height
    stops = sizes.cumsum()
    inside = (column - left.repeat(ends - starts)) * box_height.repeat(ends - starts) + row
    inside += (stops - sizes - top).repeat(ends - starts)
    inside[1::2] += 1
    painted = paint(inside, int(stops[-1]))
    boxes = zip((stops - sizes).tolist(), stops.tolist(), box_width.tolist(), left.tolist(), top.tolist(), strict=True)
    return [Crop(columns=painted[i:j].reshape(w, -1), left=x, top=y) for i, j, w, x, y in boxes]


def area_px(edges: Edges) -> int:
    """Count the pixels inside."""
    return int((edges[1::2] - edges[0::2]).sum())


def run_iou(a: Edges, b: Edges) -> float:
    """Intersection over union of two masks of one frame, 0..1. Two empty masks give 1."""
    stride = int(max(a[-1:].sum(), b[-1:].sum())) + 1
    return float(run_ious(a, b, stride=stride, count=1)[0])


def run_ious(a: Edges, b: Edges, *, stride: int, count: int) -> NDArray[np.float64]:
    """Intersection over union of `count` pairs of masks at once, (count,) 0..1.

    The edges of pair n are shifted by n * stride. stride is larger than the frame, so runs of two pairs never touch.
    """
    lengths = a[1::2] - a[0::2]
    area_a = np.bincount(a[0::2] // stride, weights=lengths, minlength=count)
    area_b = np.bincount(b[0::2] // stride, weights=b[1::2] - b[0::2], minlength=count)
    both: NDArray[np.float64] = np.zeros(count)
    if a.size and b.size:
        # The number of a's pixels before a position is linear between a's edges. So it is interpolated at b's edges.
        counted = np.empty(a.size, np.int64)
        counted[1::2] = lengths.cumsum()
        counted[0::2] = counted[1::2] - lengths
        before = np.interp(b, a, counted)
        both = np.bincount(b[0::2] // stride, weights=before[1::2] - before[0::2], minlength=count).astype(np.float64)
    union = area_a + area_b - both
    return np.divide(both, union, out=np.ones(count), where=union > 0)


def paint(edges: Edges, size: int) -> NDArray[np.uint8]:
    """(size,) uint8: 1 inside the runs. An edge may come twice, where one run ends and the next begins."""
    values = np.zeros(edges.size + 1, np.uint8)
    values[1::2] = 1
    return values.repeat(run_lengths(edges, size))


def run_lengths(edges: Edges, size: int) -> NDArray[np.int64]:
    """(2n + 1,) lengths: outside, inside, …, outside. 0 where a run touches an end of the frame of `size` pixels."""
    bounds = np.empty(edges.size + 2, np.int64)
    bounds[0], bounds[1:-1], bounds[-1] = 0, edges, size
    return bounds[1:] - bounds[:-1]


def _parse_counts(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The run lengths of all texts, one after another, and the end of each text's lengths."""
    chars = np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    text_ends = np.cumsum([len(text) for text in texts])
    is_end = (chars & 32) == 0
    for text, end in zip(texts, text_ends.tolist(), strict=True):
        part = chars[end - len(text) : end]
        if part.size == 0 or not is_end[end - 1] or part.min() < 0 or part.max() > 63:
            raise ValueError(f"counts {text[:20]!r}…: not a COCO run-length string")
    ends = np.flatnonzero(is_end)
    widths = np.diff(ends, prepend=-1)
    counts_ends = np.searchsorted(ends, text_ends)
    if widths.max() > _MAX_CHARS_A_COUNT:
        text = texts[int(np.searchsorted(counts_ends, widths.argmax(), side="right"))]
        raise ValueError(f"counts {text[:20]!r}…: one count takes {widths.max()} characters, more than a frame needs")

    # Put each count together from its 5-bit groups, the low ones first, and extend its sign.
    starts = ends - widths + 1
    shifts = 5 * (np.arange(chars.size) - starts.repeat(widths))
    lengths: NDArray[np.int64] = np.add.reduceat((chars & 31) << shifts, starts)
    lengths -= ((chars[ends] & 16) >> 4) << (5 * widths)

    # From the fourth on, a count is stored as the difference to the count two places before.
    first = 0
    for end in counts_ends.tolist():
        lengths[first + 1 : end : 2].cumsum(out=lengths[first + 1 : end : 2])
        lengths[first + 2 : end : 2].cumsum(out=lengths[first + 2 : end : 2])
        first = end
    return lengths, counts_ends


def without_empty_runs(edges: Edges) -> Edges:
    """Remove pairs of sorted edges at one place: a run of length 0, or a run that begins where the last one ended."""
    changes = edges[1:] != edges[:-1]
    if changes.all():
        return edges
    first = np.flatnonzero(np.concatenate(([True], changes)))
    times = np.diff(first, append=edges.size)
    odd: Edges = edges[first[times % 2 == 1]]
    return odd
