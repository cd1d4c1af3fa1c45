"""Masks as polygons people can edit, and polygons back as masks.

One rule both ways: a pixel belongs to a polygon when its centre does, by nonzero winding. It is what a browser's canvas
fills (before it smooths the edge), so a reviewer and the numbers reported here see the same mask.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.runs import Crop, Edges, area_px, crop_edges, run_iou, without_empty_runs

Ring = NDArray[np.float64]
"""(n, 2) x, y of a closed line whose last point joins the first: pixels of the frame, or percent where it says so."""

# Tolerances tried, coarse to fine. The outline moves in half pixels: under 0.35 only 0, the outline itself, is left.
_TOLERANCES_PX = (64.0, 45.0, 32.0, 23.0, 16.0, 11.0, 8.0, 5.7, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.0)
# Tolerance t loses about 0.14 * t * perimeter / area of IoU (median of 300 ground-truth masks of testdata/photos_masks,
# quartiles 0.115 and 0.17); starting from the optimistic quartile saves trials and rarely skips a rung that would do.
_LOSS = 0.115
# 0.00005 % is 0.004 px of 8,192, and the JSON is half of what full doubles take.
_DECIMALS = 4
# Noise: no 400 vertices come near it, and its outline alone takes 45 s at 12 megapixels (measured 2026-11-20, 2 cores).
_MAX_RUNS = 100_000
# A polygon from outside may zigzag: 400 vertices across 4,000 columns cross 1.6 million of them at the very worst.
_MAX_CROSSINGS = 4_000_000


class PolygonError(ValueError):
    """A polygon is too tangled to rasterise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Polygons:
    """A mask as polygons: one ring a part, largest first, holes cut in by keyholes.

    rings: percent of the frame's width and height. iou: of the pixels inside the rings with the mask, 0..1.
    """

    rings: tuple[Ring, ...]
    iou: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outlines:
    """Every border of a mask, exact: through the midpoints of the sides between its pixels and the others.

    lines: a border each, (n, 1, 2) float32 x, y in pixels from (left, top), outer borders and holes running opposite
    ways. areas: (borders,) float64, pixels inside each. parents: the outer border of each hole, -1 for an outer border.
    perimeter: sides of pixels in all borders. left, top: pixels in the frame.
    """

    lines: list[NDArray[np.float32]]
    areas: NDArray[np.float64]
    parents: list[int]
    perimeter: int
    left: int
    top: int


def polygons_from_edges(
    edges: Edges, size_hw: tuple[int, int], *, min_iou: float = 0.98, max_vertices: int = 400, max_parts: int = 16
) -> Polygons | None:
    """Find coarse polygons whose IoU with the mask is at least min_iou, within a budget of vertices and parts a mask.

    The tolerance starts at 1/1000 of the frame's longer side (about a pixel of a reviewer's screen; at least one of the
    image) and shrinks until the IoU holds, at the latest with the exact outline, whose IoU is 1. Parts and holes
    smaller than the tolerance squared are dropped, which the IoU counts. Where the budget ends first the best that fits
    is returned, its IoU below min_iou; None where nothing fits, or the mask is empty or mere noise.
    """
    if not 0 < edges.size // 2 <= _MAX_RUNS:
        return None
    outlines = _trace_outlines(crop_edges(edges, size_hw))
    first = _first_tolerance(outlines, area_px(edges), size_hw, min_iou)

    def fit(tolerance: float) -> tuple[float, list[list[Ring]]] | None:
        parts = _simplify(outlines, tolerance, size_hw, max_vertices=max_vertices, max_parts=max_parts)
        if not parts:
            return None if parts is None else (0.0, [])
        rings = [ring_px(ring, size_hw) for part in parts for ring in part]
        return run_iou(edges, polygon_edges(rings, size_hw)), parts

    # Go finer until the IoU holds or the budget ends; go coarser where already the first is over the budget.
    best: tuple[float, list[list[Ring]]] = (0.0, [])
    for tolerance in _TOLERANCES_PX[first:]:
        fitted = fit(tolerance)
        if fitted is None:
            break
        best = max(best, fitted, key=operator.itemgetter(0))
        if best[0] >= min_iou:
            break
    if not best[1]:
        best = next(filter(None, map(fit, reversed(_TOLERANCES_PX[:first]))), best)

    rings = tuple(_cut_keyholes(outer, holes) for outer, *holes in best[1])
    return Polygons(rings=rings, iou=best[0]) if rings else None


def polygon_edges(rings: Sequence[Ring], size_hw: tuple[int, int]) -> Edges:
    """Rasterise rings in pixels, together, as one mask's edges: pixels whose centre is inside by nonzero winding.

    What lies outside the frame is cut off. Raises PolygonError where they cross more columns than a mask could need.
    """
    height, width = size_hw
    # Every side, and the columns whose pixel centres it passes.
    points = np.concatenate(rings)
    x, y = points.T
    following = _following(np.cumsum([len(ring) for ring in rings]))
    column_of = np.minimum(np.maximum(np.ceil(x - 0.5), 0), width).astype(np.int64)
    columns = column_of[following] - column_of
    side = np.flatnonzero(columns)
    crossings = np.abs(columns[side])
    if crossings.sum() > _MAX_CROSSINGS:
        raise PolygonError(
            f"a polygon of {len(points)} points crosses {crossings.sum()} columns of pixels: too tangled"
        )

    # Where it crosses each of them, from the left. Both ways along one line give the same floats: keyholes cancel out.
    rightwards = columns[side] > 0
    left = np.where(rightwards, side, following[side])
    right = np.where(rightwards, following[side], side)
    slope = (y[right] - y[left]) / (x[right] - x[left])
    stops = crossings.cumsum()
    column = np.arange(int(crossings.sum())) + (column_of[left] - stops + crossings).repeat(crossings)
    y_there = (y[left] - x[left] * slope).repeat(crossings) + (column + 0.5) * slope.repeat(crossings)
    row = np.minimum(np.maximum(np.ceil(y_there - 0.5), 0), height).astype(np.int64)
    position = column * height + row

    # Wind down the columns: every one starts and ends at zero.
    order = position.argsort(kind="stable")
    inside = np.where(rightwards, 1, -1).repeat(crossings)[order].cumsum() != 0
    changes = inside.copy()
    changes[1:] ^= inside[:-1]
    return without_empty_runs(position[order[changes]])


def ring_px(ring: Ring, size_hw: tuple[int, int]) -> Ring:
    """Percent of width and height to pixels of the frame."""
    return ring * (size_hw[1] / 100, size_hw[0] / 100)


def ring_percent(ring: Ring, size_hw: tuple[int, int]) -> Ring:
    """Pixels of the frame to percent of width and height, rounded."""
    return np.round(ring * (100 / size_hw[1], 100 / size_hw[0]), _DECIMALS)


def _first_tolerance(outlines: _Outlines, area: int, size_hw: tuple[int, int], min_iou: float) -> int:
    """Index of the coarsest tolerance that is small enough to look at and may reach min_iou."""
    limit = min(max(1.0, max(size_hw) / 1000), (1 - min_iou) * area / (_LOSS * outlines.perimeter))
    return next(i for i, tolerance in enumerate(_TOLERANCES_PX) if tolerance <= limit)


def _simplify(
    outlines: _Outlines, tolerance: float, size_hw: tuple[int, int], *, max_vertices: int, max_parts: int
) -> list[list[Ring]] | None:
    """The parts, largest first, each an outer ring and its holes in percent; None where they exceed the budget.

    Douglas-Peucker, a border at a time.
    """
    lines: list[NDArray[np.float32]] = []
    parts: dict[int, list[int]] = {}
    vertices = 0
    # A hole comes after the part it is in, because that is larger.
    for border in np.argsort(-outlines.areas, kind="stable").tolist():
        if outlines.areas[border] < tolerance * tolerance:
            break
        line = cv2.approxPolyDP(outlines.lines[border], tolerance, True)
        parent = outlines.parents[border]
        if len(line) < 3 or (parent >= 0 and parent not in parts):
            continue
        parts.setdefault(border if parent < 0 else parent, []).append(len(lines))
        lines.append(line)
        # A keyhole repeats one point on either side.
        vertices += len(line) if parent < 0 else len(line) + 2
        if vertices > max_vertices or len(parts) > max_parts:
            return None
    if not lines:
        return []
    points = ring_percent(np.concatenate(lines)[:, 0, :] + np.array([outlines.left, outlines.top]), size_hw)
    rings = np.split(points, np.cumsum([len(line) for line in lines])[:-1])
    return [[rings[i] for i in part] for part in parts.values()]


def _cut_keyholes(outer: Ring, holes: list[Ring]) -> Ring:
    """Join each hole into the ring by a bridge there and back between the two nearest points."""
    ring = outer
    for hole in holes:
        gaps = (ring[:, :1] - hole[:, 0]) ** 2 + (ring[:, 1:] - hole[:, 1]) ** 2
        i, j = divmod(int(gaps.argmin()), len(hole))
        ring = np.concatenate((ring[: i + 1], hole[j:], hole[: j + 1], ring[i:]))
    return ring


def _trace_outlines(crop: Crop) -> _Outlines:
    """Turn OpenCV's borders, which run through pixel centres, into borders between the pixels.

    A border visits pixels; at each, the sides that face out lie between the way it came and the way it leaves, in the
    order of Suzuki and Abe's border following (1985), which OpenCV implements. Pixels touching at a corner are joined.
    """
    contours, hierarchy = cv2.findContours(crop.columns, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    ends = np.cumsum([len(contour) for contour in contours])
    pixels = np.concatenate(contours)[:, 0, :].astype(np.int64)

    # Which sides face out at each visit.
    code = pixels[:, 0] + 3 * pixels[:, 1]
    following = _following(ends)
    leaves = _COMPASS_OF_STEP.take(code[following] - code + 4)
    came = np.empty_like(leaves)
    came[following] = _OPPOSITE.take(leaves)
    turn = came * 9 + leaves
    sides = _SIDES.take(turn)
    stops = sides.cumsum()
    index = np.arange(int(stops[-1])) + (4 * turn - stops + sides).repeat(sides)
    # The crop lies on its side: OpenCV's x is the image's y, as the table knows.
    points = pixels[:, ::-1].astype(np.float32).repeat(sides, axis=0) + _MIDPOINTS.take(index, axis=0)

    ends = stops[ends - 1]
    starts = [0, *ends[:-1].tolist()]
    return _Outlines(
        lines=[points[a:b, None, :] for a, b in zip(starts, ends.tolist(), strict=True)],
        areas=_areas(points, starts, ends),
        parents=hierarchy[0, :, 3].tolist(),
        perimeter=len(points),
        left=crop.left,
        top=crop.top,
    )


def _areas(points: NDArray[np.float32], starts: list[int], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    """Areas of closed lines, whatever way they run. Shoelace formula."""
    x, y = points[:, 0].astype(np.float64), points[:, 1].astype(np.float64)
    following = _following(ends)
    areas: NDArray[np.float64] = np.abs(np.add.reduceat(x * y[following] - x[following] * y, starts)) / 2
    return areas


def _following(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """For closed lines one after another that end before `ends`: the index of the point after each, (points,)."""
    following = np.arange(1, int(ends[-1]) + 1)
    following[ends[0] - 1] = 0
    following[ends[1:] - 1] = ends[:-1]
    return following


def _border_tables() -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Tables by compass direction, 0 to 7 in 45-degree turns from OpenCV's +x to its +y; 8 is a border of one pixel.

    Step (3 * dy + dx + 4) to direction; direction to its opposite; (9 * where it came from + where it leaves to) to the
    number of sides facing out; four times that plus their count to the midpoint of each in the image, x and y from the
    corner of the pixel.
    """
    compass = np.array([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
    of_step = np.full(9, 8)
    of_step[compass @ (1, 3) + 4] = np.arange(8)
    opposite = np.array([4, 5, 6, 7, 0, 1, 2, 3, 8])
    sides = np.zeros((9, 9), np.intp)
    midpoints = np.zeros((9, 9, 4, 2), np.float32)
    for came, leaves in itertools.product(range(9), repeat=2):
        # From where it came round to where it leaves; a whole turn at the end of a line and for a single pixel.
        turns = range(1, (came - leaves) % 8 or 8) if came < 8 else range(8)
        facing = [(came - turn) % 8 for turn in turns if (came - turn) % 2 == 0]
        sides[came, leaves] = len(facing)
        for nth, direction in enumerate(facing):
            midpoints[came, leaves, nth] = 0.5 + compass[direction][::-1] / 2
    return of_step, opposite, sides.ravel(), midpoints.reshape(-1, 2)


_COMPASS_OF_STEP, _OPPOSITE, _SIDES, _MIDPOINTS = _border_tables()
