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
    left, first_row = np.divmod(edges[0::2], height)
    right, last_row = np.divmod(edges[1::2] - 1, height)
    # A run that goes on into the next column touches the frame's bottom and top.
    tall = bool((left != right).any())
    top, bottom = (0, height) if tall else (int(first_row.min()), int(last_row.max()) + 1)
    box_left, box_width, box_height = int(left[0]), int(right[-1] - left[0]) + 1, bottom - top
    inside = np.empty_like(edges)
    inside[0::2] = (left - box_left) * box_height + first_row - top
    inside[1::2] = (right - box_left) * box_height + last_row - top + 1
    columns = paint(inside, box_width * box_height).reshape(box_width, box_height)
    return Crop(columns=columns, left=box_left, top=top)


def area_px(edges: Edges) -> int:
    """Count the pixels inside."""
    return int((edges[1::2] - edges[0::2]).sum())


def run_iou(a: Edges, b: Edges) -> float:
    """Intersection over union of two masks of one frame, 0..1; two empty masks agree, 1."""
    area_a, area_b = area_px(a), area_px(b)
    both = 0
    if area_a and area_b:
        # The number of a's pixels before a position is linear between a's edges, so b's runs only read it off.
        counted = np.concatenate(([0], np.cumsum(np.diff(a) * (np.arange(a.size - 1) % 2 == 0))))
        both = round(float(np.diff(np.interp(b, a, counted))[0::2].sum()))
    union = area_a + area_b - both
    return both / union if union else 1.0


def paint(edges: Edges, size: int) -> NDArray[np.uint8]:
    """(size,) uint8: 1 inside the runs. Edges may repeat, where one run ends and the next begins."""
    lengths = np.diff(edges, prepend=0, append=size)
    values = np.zeros(lengths.size, np.uint8)
    values[1::2] = 1
    return np.repeat(values, lengths)


def _parse_counts(counts: str) -> NDArray[np.int64]:
    chars = np.frombuffer(counts.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((chars & 32) == 0)
    if chars.size == 0 or chars.min() < 0 or chars.max() > 63 or ends.size == 0 or ends[-1] != chars.size - 1:
        raise ValueError(f"counts {counts[:20]!r}…: not a COCO run-length string")
    widths = np.diff(ends, prepend=-1)
    if widths.max() > _MAX_CHARS_A_COUNT:
        raise ValueError(f"counts {counts[:20]!r}…: one count takes {widths.max()} characters, more than a frame needs")

    # Assemble each count from its 5-bit groups, the low ones first, and extend its sign.
    starts = ends - widths + 1
    shifts = 5 * (np.arange(chars.size) - np.repeat(starts, widths))
    lengths: NDArray[np.int64] = np.add.reduceat((chars & 31) << shifts, starts)
    lengths -= ((chars[ends] & 16) >> 4) << (5 * widths)

    # From the fourth on, a count is stored as the difference with the one two places before.
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return lengths


def without_empty_runs(edges: Edges) -> Edges:
    """Two edges at one place cancel out; encoders may write runs of length 0."""
    if edges.size and (edges[1:] == edges[:-1]).any():
        places, times = np.unique(edges, return_counts=True)
        odd: Edges = places[times % 2 == 1]
        return odd
    return edges
