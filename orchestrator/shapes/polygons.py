"""Masks as polygons people can edit, and polygons back as masks.

One rule both ways: a pixel belongs to a polygon when its centre does, by nonzero winding. It is what a browser's canvas
fills (before it smooths the edge), so a reviewer and the numbers reported here see the same mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.shapes.runs import Crop, Edges, area_px, crops_of_masks, run_ious, without_empty_runs

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
# A ring from outside may zigzag: 400 vertices across 4,000 columns cross 1.6 million of them at the very worst.
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
    ways; the largest first, so a hole comes after the border it is in. areas: pixels inside each. parents: the outer
    border of each hole, -1 for an outer border. perimeter: sides of pixels in all. left, top: pixels in the frame.
    """

    lines: list[NDArray[np.float32]]
    areas: list[float]
    parents: list[int]
    perimeter: int
    left: int
    top: int


@dataclass(slots=True, kw_only=True)
class _Search:
    """Where the search for one mask's polygons stands: the tolerance to try, and the best so far."""

    outlines: _Outlines
    rung: int
    going_coarser: bool = False
    iou: float = 0.0
    parts: list[list[Ring]] = field(default_factory=list)


def fit_polygons(
    masks: Sequence[Edges],
    size_hw: tuple[int, int],
    *,
    min_iou: float = 0.98,
    max_vertices: int = 400,
    max_parts: int = 16,
) -> list[Polygons | None]:
    """Find for each mask the coarsest polygons that reach min_iou within a budget of vertices and parts a mask.

    The tolerance starts at 1/1000 of the frame's longer side (about a pixel of a reviewer's screen; at least one of the
    image) and shrinks until the IoU holds, at the latest with the exact outline, whose IoU is 1. Parts and holes
    smaller than the tolerance squared are dropped, which the IoU counts. Where the budget ends first the best that fits
    is returned, its IoU below min_iou; None where nothing fits, or the mask is empty or mere noise.
    Fifty small masks at once take half the time of one by one, where numpy's calls outweigh the work.
    """
    traced = [n for n, edges in enumerate(masks) if 0 < edges.size // 2 <= _MAX_RUNS]
    outlines = _trace_outlines(crops_of_masks([masks[n] for n in traced], size_hw)) if traced else []
    searches = {
        n: _Search(outlines=outline, rung=_first_rung(outline, area_px(masks[n]), size_hw, min_iou))
        for n, outline in zip(traced, outlines, strict=True)
    }

    # Try one tolerance of every mask that is still searching, then look at them together.
    pending = traced
    while pending:
        tried = {n: parts for n in pending if (parts := _next_parts(searches[n], max_vertices, max_parts))}
        fits = _measure(masks, {n: (searches[n].outlines, parts) for n, parts in tried.items()}, size_hw)
        pending = [n for n, (iou, parts) in fits.items() if not _is_done(searches[n], iou, parts, min_iou)]
    return [_result(searches.get(n)) for n in range(len(masks))]


def polygon_edges(rings: Sequence[Ring], size_hw: tuple[int, int]) -> Edges:
    """Rasterise rings in pixels, together, as one mask's edges: pixels whose centre is inside by nonzero winding.

    What lies outside the frame is cut off. Raises PolygonError where they cross more columns than a mask could need.
    """
    sizes = np.array([len(ring) for ring in rings])
    return _rasterise(np.concatenate(rings), sizes, np.zeros(len(rings), np.int64), size_hw)


def ring_px(ring: Ring, size_hw: tuple[int, int]) -> Ring:
    """Percent of width and height to pixels of the frame."""
    return ring * (size_hw[1] / 100, size_hw[0] / 100)


def ring_percent(ring: Ring, size_hw: tuple[int, int]) -> Ring:
    """Pixels of the frame to percent of width and height, rounded."""
    return np.round(ring * (100 / size_hw[1], 100 / size_hw[0]), _DECIMALS)


def _rasterise(points: Ring, sizes: NDArray[np.int64], offsets: NDArray[np.int64], size_hw: tuple[int, int]) -> Edges:
    """polygon_edges of rings one after another, (rings,) sizes; offsets are added to the edges of each ring."""
    height, width = size_hw
    # Every side, and the columns whose pixel centres it passes.
    x, y = points.T
    following = _following(sizes.cumsum())
    column_of = np.minimum(np.maximum(np.ceil(x - 0.5), 0), width).astype(np.int64)
    columns = column_of[following] - column_of
    side = np.flatnonzero(columns)
    crossings = np.abs(columns[side])
    if crossings.sum() > _MAX_CROSSINGS * len(sizes):
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
    position = column * height + row + offsets.repeat(sizes)[side].repeat(crossings)

    # Wind down the columns: every one starts and ends at zero.
    order = position.argsort(kind="stable")
    inside = np.where(rightwards, 1, -1).repeat(crossings)[order].cumsum() != 0
    changes = inside.copy()
    changes[1:] ^= inside[:-1]
    return without_empty_runs(position[order[changes]])


def _first_rung(outlines: _Outlines, area: int, size_hw: tuple[int, int], min_iou: float) -> int:
    """Index of the coarsest tolerance that is small enough to look at and may reach min_iou."""
    limit = min(max(1.0, max(size_hw) / 1000), (1 - min_iou) * area / (_LOSS * outlines.perimeter))
    return next(i for i, tolerance in enumerate(_TOLERANCES_PX) if tolerance <= limit)


def _next_parts(search: _Search, max_vertices: int, max_parts: int) -> list[list[NDArray[np.float32]]] | None:
    """Simplify at the search's tolerance, or at the next coarser one within the budget while nothing has fitted yet."""
    while 0 <= search.rung < len(_TOLERANCES_PX):
        parts = _simplify(search.outlines, _TOLERANCES_PX[search.rung], max_vertices, max_parts)
        if parts or (parts is None and search.parts):
            return parts
        if parts is not None and search.going_coarser:
            return None
        search.going_coarser = parts is None
        search.rung += -1 if search.going_coarser else 1
    return None


def _measure(
    masks: Sequence[Edges],
    tried: dict[int, tuple[_Outlines, list[list[NDArray[np.float32]]]]],
    size_hw: tuple[int, int],
) -> dict[int, tuple[float, list[list[Ring]]]]:
    """The IoU of each mask with its parts, and the parts as rings in percent."""
    if not tried:
        return {}
    # All rings of all masks, rounded as they will be sent.
    lines = [line for _, parts in tried.values() for part in parts for line in part]
    sizes = np.array([len(line) for line in lines])
    points_of = [sum(len(line) for part in parts for line in part) for _, parts in tried.values()]
    corners = np.array([(outlines.left, outlines.top) for outlines, _ in tried.values()])
    points = ring_percent(np.concatenate(lines) + corners.repeat(points_of, axis=0), size_hw)

    # Each mask gets a frame of its own, one position longer, so that runs of two never touch.
    stride = size_hw[0] * size_hw[1] + 1
    rings_of = [sum(len(part) for part in parts) for _, parts in tried.values()]
    offsets = (np.arange(len(tried)) * stride).repeat(rings_of)
    found = _rasterise(ring_px(points, size_hw), sizes, offsets, size_hw)
    wanted = np.concatenate([masks[n] + place * stride for place, n in enumerate(tried)])
    ious = run_ious(wanted, found, stride=stride, count=len(tried)).tolist()

    rings = iter(np.split(points, sizes.cumsum()[:-1]))
    return {
        n: (iou, [[next(rings) for _ in part] for part in parts])
        for iou, (n, (_, parts)) in zip(ious, tried.items(), strict=True)
    }


def _is_done(search: _Search, iou: float, parts: list[list[Ring]], min_iou: float) -> bool:
    """Keep what was found if it is the best, and go on to the next finer tolerance where that can help."""
    if iou > search.iou:
        search.iou, search.parts = iou, parts
    search.rung += 1
    return iou >= min_iou or search.going_coarser or search.rung == len(_TOLERANCES_PX)


def _result(search: _Search | None) -> Polygons | None:
    if search is None or not search.parts:
        return None
    rings = tuple(_cut_keyholes(outer, holes) for outer, *holes in search.parts)
    return Polygons(rings=rings, iou=search.iou)


def _simplify(
    outlines: _Outlines, tolerance: float, max_vertices: int, max_parts: int
) -> list[list[NDArray[np.float32]]] | None:
    """The parts, largest first, each an outer border and its holes, (n, 2); None where they exceed the budget.

    Douglas-Peucker, a border at a time.
    """
    parts: dict[int, list[NDArray[np.float32]]] = {}
    vertices = 0
    for border, (line, area, parent) in enumerate(zip(outlines.lines, outlines.areas, outlines.parents, strict=True)):
        if area < tolerance * tolerance:
            break
        simple = cv2.approxPolyDP(line, tolerance, True)
        if len(simple) < 3 or (parent >= 0 and parent not in parts):
            continue
        parts.setdefault(border if parent < 0 else parent, []).append(simple[:, 0, :].astype(np.float32, copy=False))
        # A keyhole repeats one point on either side.
        vertices += len(simple) if parent < 0 else len(simple) + 2
        if vertices > max_vertices or len(parts) > max_parts:
            return None
    return list(parts.values())


def _cut_keyholes(outer: Ring, holes: list[Ring]) -> Ring:
    """Join each hole into the ring by a bridge there and back between the two nearest points."""
    ring = outer
    for hole in holes:
        gaps = (ring[:, :1] - hole[:, 0]) ** 2 + (ring[:, 1:] - hole[:, 1]) ** 2
        i, j = divmod(int(gaps.argmin()), len(hole))
        ring = np.concatenate((ring[: i + 1], hole[j:], hole[: j + 1], ring[i:]))
    return ring


def _trace_outlines(crops: list[Crop]) -> list[_Outlines]:
    """Turn OpenCV's borders, which run through pixel centres, into borders between the pixels.

    A border visits pixels; at each, the sides that face out lie between the way it came and the way it leaves, in the
    order of Suzuki and Abe's border following (1985), which OpenCV implements. Pixels touching at a corner are joined.
    """
    found = [cv2.findContours(crop.columns, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE) for crop in crops]
    contours = [contour for borders, _ in found for contour in borders]
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
    # The crops lie on their side: OpenCV's x is the image's y, as the table knows.
    points = pixels[:, ::-1].astype(np.float32).repeat(sides, axis=0) + _MIDPOINTS.take(index, axis=0)

    ends = stops[ends - 1]
    starts = np.concatenate(([0], ends[:-1]))
    borders = zip(starts.tolist(), ends.tolist(), _areas(points, starts, ends).tolist(), strict=True)
    return [
        _gather(crop, points, list(itertools.islice(borders, len(parents))), parents)
        for crop, parents in zip(crops, (hierarchy[0, :, 3].tolist() for _, hierarchy in found), strict=True)
    ]


def _gather(
    crop: Crop, points: NDArray[np.float32], borders: list[tuple[int, int, float]], parents: list[int]
) -> _Outlines:
    """One mask's outlines: its borders as (start, end, area) in the points, and the outer border of each hole."""
    order = sorted(range(len(borders)), key=lambda border: -borders[border][2])
    place = {border: n for n, border in enumerate(order)}
    return _Outlines(
        lines=[points[borders[n][0] : borders[n][1], None, :] for n in order],
        areas=[borders[n][2] for n in order],
        parents=[place.get(parents[n], -1) for n in order],
        perimeter=borders[-1][1] - borders[0][0],
        left=crop.left,
        top=crop.top,
    )


def _areas(points: NDArray[np.float32], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.float64]:
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
