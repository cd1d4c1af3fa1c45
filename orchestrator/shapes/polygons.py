"""Masks as polygons people can edit, and polygons back as masks.

One rule both ways: a pixel belongs to a polygon when its centre does, by nonzero winding. It is what a browser's canvas
fills (before it smooths the edge), so a reviewer and the numbers reported here see the same mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.shapes.outline_tracing import Outlines, trace_outlines
from orchestrator.shapes.rasterise import Ring, rasterise, ring_percent, ring_px
from orchestrator.shapes.runs import Edges, area_px, crops_of_masks, run_ious

# Tolerances to try, from coarse to fine. The outline's points are half pixels apart, so below 0.35 only the outline
# itself (0) is left.
_TOLERANCES_PX = (64.0, 45.0, 32.0, 23.0, 16.0, 11.0, 8.0, 5.7, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.0)
# A tolerance t loses about 0.14 * t * perimeter / area of IoU (median of 300 ground-truth masks of
# testdata/photos_masks, quartiles 0.115 and 0.17). The lower quartile saves trials, and rarely skips a tolerance that
# would be good enough.
_LOSS = 0.115
# More runs are noise: 400 vertices cannot describe it, and its outline alone takes 45 s at 12 megapixels (measured
# 2026-11-20, 2 cores).
_MAX_RUNS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Polygons:
    """A mask as polygons: one ring for each part, largest first. Keyholes connect the holes to the ring.

    rings: percent of the frame's width and height. iou: IoU of the pixels inside the rings with the mask, 0..1.
    """

    rings: tuple[Ring, ...]
    iou: float


@dataclass(slots=True, kw_only=True)
class _Search:
    """The state of the search for one mask's polygons: the tolerance to try, and the best polygons so far."""

    outlines: Outlines
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
    """Find for each mask the coarsest polygons that reach min_iou, with at most max_vertices and max_parts a mask.

    The tolerance starts at 1/1000 of the frame's longer side: about a pixel of a reviewer's screen, and at least one
    pixel of the image. It shrinks until the IoU is high enough. The last tolerance is the exact outline, with IoU 1.
    Parts and holes smaller than the tolerance squared are dropped; the IoU takes that into account. When the polygons
    exceed the budget first, the best ones that fit are returned, with an IoU below min_iou. The result is None when
    nothing fits, or when the mask is empty or noise. Fifty small masks at once take half the time of one by one,
    because numpy's calls cost more than the work.
    """
    traced = [n for n, edges in enumerate(masks) if 0 < edges.size // 2 <= _MAX_RUNS]
    outlines = trace_outlines(crops_of_masks([masks[n] for n in traced], size_hw)) if traced else []
    searches = {
        n: _Search(outlines=outline, rung=_first_rung(outline, area_px(masks[n]), size_hw, min_iou))
        for n, outline in zip(traced, outlines, strict=True)
    }

    # Try one tolerance for every mask that is still searching, then measure all of them together.
    pending = traced
    while pending:
        tried = {n: parts for n in pending if (parts := _next_parts(searches[n], max_vertices, max_parts))}
        fits = _measure(masks, {n: (searches[n].outlines, parts) for n, parts in tried.items()}, size_hw)
        pending = [n for n, (iou, parts) in fits.items() if not _is_done(searches[n], iou, parts, min_iou)]
    return [_result(searches.get(n)) for n in range(len(masks))]


def _first_rung(outlines: Outlines, area: int, size_hw: tuple[int, int], min_iou: float) -> int:
    """Index of the coarsest tolerance that is small enough for a reviewer's eye and may reach min_iou."""
    limit = min(max(1.0, max(size_hw) / 1000), (1 - min_iou) * area / (_LOSS * outlines.perimeter))
    return next(i for i, tolerance in enumerate(_TOLERANCES_PX) if tolerance <= limit)


def _next_parts(search: _Search, max_vertices: int, max_parts: int) -> list[list[NDArray[np.float32]]] | None:
    """Simplify at the search's tolerance. While nothing has fitted yet, try coarser ones until the budget is kept."""
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
    tried: dict[int, tuple[Outlines, list[list[NDArray[np.float32]]]]],
    size_hw: tuple[int, int],
) -> dict[int, tuple[float, list[list[Ring]]]]:
    """The IoU of each mask with its parts, and the parts as rings in percent."""
    if not tried:
        return {}
    # All rings of all masks, rounded as for sending.
    lines = [line for _, parts in tried.values() for part in parts for line in part]
    sizes = np.array([len(line) for line in lines])
    points_of = [sum(len(line) for part in parts for line in part) for _, parts in tried.values()]
    corners = np.array([(outlines.left, outlines.top) for outlines, _ in tried.values()])
    points = ring_percent(np.concatenate(lines) + corners.repeat(points_of, axis=0), size_hw)

    # Each mask gets its own frame, one position longer, so that runs of two masks never touch.
    stride = size_hw[0] * size_hw[1] + 1
    rings_of = [sum(len(part) for part in parts) for _, parts in tried.values()]
    offsets = (np.arange(len(tried)) * stride).repeat(rings_of)
    found = rasterise(ring_px(points, size_hw), sizes, offsets, size_hw)
    wanted = np.concatenate([masks[n] + place * stride for place, n in enumerate(tried)])
    ious = run_ious(wanted, found, stride=stride, count=len(tried)).tolist()

    rings = iter(np.split(points, sizes.cumsum()[:-1]))
    return {
        n: (iou, [[next(rings) for _ in part] for part in parts])
        for iou, (n, (_, parts)) in zip(ious, tried.items(), strict=True)
    }


def _is_done(search: _Search, iou: float, parts: list[list[Ring]], min_iou: float) -> bool:
    """Keep these parts if they are the best so far, and go to the next finer tolerance. True when the search ends."""
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
    outlines: Outlines, tolerance: float, max_vertices: int, max_parts: int
) -> list[list[NDArray[np.float32]]] | None:
    """The parts, largest first, each an outer border and its holes, (n, 2). None when they exceed the budget.

    Douglas-Peucker, one border at a time.
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
        # A keyhole repeats one point on each side.
        vertices += len(simple) if parent < 0 else len(simple) + 2
        if vertices > max_vertices or len(parts) > max_parts:
            return None
    return list(parts.values())


def _cut_keyholes(outer: Ring, holes: list[Ring]) -> Ring:
    """Join each hole to the ring by a bridge between the two nearest points, which is passed in both directions."""
    ring = outer
    for hole in holes:
        gaps = (ring[:, :1] - hole[:, 0]) ** 2 + (ring[:, 1:] - hole[:, 1]) ** 2
        i, j = divmod(int(gaps.argmin()), len(hole))
        ring = np.concatenate((ring[: i + 1], hole[j:], hole[: j + 1], ring[i:]))
    return ring
