"""From polygons to pixels. A pixel belongs to a polygon when its centre lies inside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.shapes.outline_tracing import successors
from orchestrator.shapes.runs import Edges, without_empty_runs

Ring = NDArray[np.float64]
"""A closed line (n, 2), x, y: the last point joins the first. In pixels of the frame, or in percent where named so."""
# An error of 0.00005 % is 0.004 px of 8,192, and the JSON is half as large as with full doubles.
_DECIMALS = 4

# A ring from outside may zigzag. In the worst case 400 vertices across 4,000 columns make 1.6 million crossings.
_MAX_CROSSINGS = 4_000_000


class PolygonError(ValueError):
    """A polygon is too tangled to rasterise."""


def polygon_edges(rings: Sequence[Ring], size_hw: tuple[int, int]) -> Edges:
    """Rasterise rings in pixels together, as one mask's edges: the pixels with their centre inside by nonzero winding.

    Parts outside the frame are cut off. Raises PolygonError when the rings cross more columns than a mask could need.
    """
    sizes = np.array([len(ring) for ring in rings])
    return rasterise(np.concatenate(rings), sizes, np.zeros(len(rings), np.int64), size_hw)


def ring_px(ring: Ring, size_hw: tuple[int, int]) -> Ring:
    """From percent of width and height to pixels of the frame."""
    return ring * (size_hw[1] / 100, size_hw[0] / 100)


def ring_percent(ring: Ring, size_hw: tuple[int, int]) -> Ring:
    """From pixels of the frame to percent of width and height, rounded."""
    return np.round(ring * (100 / size_hw[1], 100 / size_hw[0]), _DECIMALS)


def rasterise(points: Ring, sizes: NDArray[np.int64], offsets: NDArray[np.int64], size_hw: tuple[int, int]) -> Edges:
    """polygon_edges for rings one after another. sizes: (rings,). offsets: (rings,), added to each ring's edges."""
    height, width = size_hw
    # For every side: the columns with a pixel centre that the side passes.
    x, y = points.T
    following = successors(sizes.cumsum())
    column_of = np.minimum(np.maximum(np.ceil(x - 0.5), 0), width).astype(np.int64)
    columns = column_of[following] - column_of
    side = np.flatnonzero(columns)
    crossings = np.abs(columns[side])
    if crossings.sum() > _MAX_CROSSINGS * len(sizes):
        raise PolygonError(
            f"a polygon of {len(points)} points crosses {crossings.sum()} columns of pixels: too tangled"
        )

    # Where a side crosses each of these columns, computed from the left. So both directions along a line give the same
    # floats, and keyholes cancel out.
    rightwards = columns[side] > 0
    left = np.where(rightwards, side, following[side])
    right = np.where(rightwards, following[side], side)
    slope = (y[right] - y[left]) / (x[right] - x[left])
    stops = crossings.cumsum()
    column = np.arange(int(crossings.sum())) + (column_of[left] - stops + crossings).repeat(crossings)
    y_there = (y[left] - x[left] * slope).repeat(crossings) + (column + 0.5) * slope.repeat(crossings)
    row = np.minimum(np.maximum(np.ceil(y_there - 0.5), 0), height).astype(np.int64)
    position = column * height + row + offsets.repeat(sizes)[side].repeat(crossings)

    # Sum up the winding down each column. Every column starts and ends at zero.
    order = position.argsort(kind="stable")
    inside = np.where(rightwards, 1, -1).repeat(crossings)[order].cumsum() != 0
    changes = inside.copy()
    changes[1:] ^= inside[:-1]
    return without_empty_runs(position[order[changes]])
