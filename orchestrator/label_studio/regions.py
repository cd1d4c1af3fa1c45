"""Masks as Label Studio regions, and a task with them.

Pure functions, no server. A region is an approximation for editing. The exact mask stays in Postgres; the region's id
holds its number. The IoU of each region with its exact mask is returned beside the regions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.label_studio.brush import encode_brush_counts
from orchestrator.label_studio.names import (
    BRUSH_CONTROL,
    DEFAULT_LABEL,
    IMAGE_CONTROL,
    POLYGON_CONTROL,
    RECTANGLE_CONTROL,
    RegionKind,
)
from orchestrator.shapes.polygons import Polygons, fit_polygons
from orchestrator.shapes.runs import edges_of_masks
from workers.masks import Mask

# Below the first, a polygon misleads the person who corrects it, so auto takes brush. Below the second, it is wrong.
_MIN_POLYGON_IOU = 0.95
_MIN_SHOWN_IOU = 0.5
_MOST_DIGITS = 9  # of a mask's number: the database has 32 bits for it
# Masks fitted at once. Enough to share numpy's calls; few enough to stop soon after max_masks, and to stay under about
# 200 MiB for any masks.
_TOGETHER = 50
_CHARACTERS_TOGETHER = 500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """The regions of one asset.

    result: Label Studio's region dicts, ready for JSON. ious: IoU 0..1 of each shown mask with its regions, in the
    order of result. left_out: how many masks are not shown.
    """

    result: list[dict[str, Any]]
    ious: tuple[float, ...]
    left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """One mask in one of Label Studio's geometries: a value for each of its regions, without the label."""

    control: str
    values: list[dict[str, Any]]
    iou: float


def regions_for(
    masks: Sequence[Mask],
    *,
    asset_id: int | str,
    numbers: Sequence[int] | None = None,
    as_: RegionKind = "auto",
    max_masks: int | None = None,
    max_brush: int | None = None,
    max_brush_bytes: int | None = None,
    max_vertices: int = 400,
) -> Regions:
    """Turn an asset's masks into regions, the best predicted IoU first. Without limits: every mask that has pixels.

    auto: polygons of IoU 0.98 or more within max_vertices a mask (fit_polygons). If the best polygon is under 0.95:
    brush, for at most max_brush masks with a stream of at most max_brush_bytes; for others, that polygon. polygon,
    brush, rectangle: only that geometry. A mask without a polygon of at least 0.5 is left out if brush is not allowed.
    A region's id is m<asset_id>-<n>; n is the mask's number in `numbers`, by default its place in `masks`. Further
    parts end in -p1, -p2, …; the first part is their parent. A mask is shown whole or not at all. max_masks counts
    masks, not parts.
    """
    if len({mask.size_hw for mask in masks}) > 1:
        raise ValueError(f"asset {asset_id}: its masks have different frames: {sorted({m.size_hw for m in masks})}")
    result: list[dict[str, Any]] = []
    ious: list[float] = []
    brushes = 0
    for n, polygons in _ranked_polygons(masks, as_, max_vertices):
        if len(ious) == max_masks:
            break
        brush_allowed = as_ == "brush" or max_brush is None or brushes < max_brush
        shape = _shape(masks[n], polygons, as_, max_brush_bytes=(max_brush_bytes or math.inf) if brush_allowed else 0)
        if shape is None:
            continue
        result.extend(_region_dicts(masks[n], shape, f"m{asset_id}-{n if numbers is None else numbers[n]}"))
        ious.append(shape.iou)
        brushes += shape.control == BRUSH_CONTROL
    return Regions(result=result, ious=tuple(ious), left_out=len(masks) - len(ious))


def regions_of_mask(
    mask: Mask, *, region_id: str, as_: RegionKind, max_brush_bytes: int | None = None
) -> list[dict[str, Any]]:
    """One mask as regions, drawn as `regions_for` draws it. region_id: of its first part."""
    regions = regions_for([mask], asset_id="", as_=as_, max_brush_bytes=max_brush_bytes).result
    for region in regions:
        for name in ("id", "parentID"):
            if name in region:
                region[name] = region_id + region[name].removeprefix("m-0")
    return regions


def prediction_task(
    *, image: str, asset_id: int | str, size_hw: tuple[int, int], model_version: str, regions: Regions
) -> dict[str, Any]:
    """Make the task for Label Studio's import: the image's URI, and the regions as one prediction.

    The prediction's score is the mean of its regions' scores, 0 without regions.
    """
    scores = [region["score"] for region in regions.result]
    prediction = {
        "model_version": model_version,
        "score": round(sum(scores) / len(scores), 4) if scores else 0.0,
        "result": regions.result,
    }
    data = {"image": image, "asset_id": asset_id, "width": size_hw[1], "height": size_hw[0]}
    return {"data": data, "predictions": [prediction]}


def mask_ordinal(region_id: str, asset_id: int | str) -> int | None:
    """The place of the mask that a region id of regions_for names. None for ids that others made."""
    head, _, rest = region_id.partition(f"m{asset_id}-")
    ordinal = rest.partition("-p")[0]
    is_number = ordinal.isascii() and ordinal.isdigit() and len(ordinal) <= _MOST_DIGITS
    return int(ordinal) if not head and is_number else None


def _ranked_polygons(
    masks: Sequence[Mask], as_: RegionKind, max_vertices: int
) -> Iterator[tuple[int, Polygons | None]]:
    """The masks with pixels and their places, the best predicted IoU first, with polygons if as_ needs them."""
    ranked = [n for n in range(len(masks)) if masks[n].area_px > 0]
    ranked.sort(key=lambda n: -_score(masks[n], limit=math.inf))
    for group in _groups(masks, ranked):
        polygons: list[Polygons | None] = [None] * len(group)
        if as_ in ("auto", "polygon"):
            edges = edges_of_masks([masks[n].counts for n in group], masks[0].size_hw)
            polygons = fit_polygons(edges, masks[0].size_hw, max_vertices=max_vertices)
        yield from zip(group, polygons, strict=True)


def _groups(masks: Sequence[Mask], ranked: Sequence[int]) -> Iterator[list[int]]:
    """Cut the ranking into groups that are fitted at once."""
    group: list[int] = []
    characters = 0
    for n in ranked:
        if group and (len(group) == _TOGETHER or characters + len(masks[n].counts) > _CHARACTERS_TOGETHER):
            yield group
            group, characters = [], 0
        group.append(n)
        characters += len(masks[n].counts)
    if group:
        yield group


def _shape(mask: Mask, polygons: Polygons | None, as_: RegionKind, *, max_brush_bytes: float) -> _Shape | None:
    """The mask in the requested geometry. None if it cannot be drawn so. max_brush_bytes: 0 for no brush."""
    if as_ == "rectangle":
        return _rectangle_shape(mask)
    polygon = _polygon_shape(polygons)
    if as_ == "polygon" or (polygon is not None and polygon.iou >= _MIN_POLYGON_IOU) or not max_brush_bytes:
        return polygon
    rle = encode_brush_counts(mask.counts, mask.size_hw)
    if len(rle) > max_brush_bytes:
        return polygon
    return _Shape(control=BRUSH_CONTROL, values=[{"format": "rle", "rle": rle}], iou=1.0)


def _polygon_shape(polygons: Polygons | None) -> _Shape | None:
    if polygons is None or polygons.iou < _MIN_SHOWN_IOU:
        return None
    values = [{"points": ring.tolist(), "closed": True} for ring in polygons.rings]
    return _Shape(control=POLYGON_CONTROL, values=values, iou=polygons.iou)


def _rectangle_shape(mask: Mask) -> _Shape:
    height, width = mask.size_hw
    x, y, w, h = mask.bbox_xywh
    value = {"x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width, "height": 100 * h / height}
    return _Shape(control=RECTANGLE_CONTROL, values=[value | {"rotation": 0}], iou=mask.area_px / (w * h))


def _region_dicts(mask: Mask, shape: _Shape, region_id: str) -> list[dict[str, Any]]:
    kind = f"{shape.control}labels"
    regions = []
    for part, value in enumerate(shape.values):
        region = {
            "id": f"{region_id}-p{part}" if part else region_id,
            "type": kind,
            "from_name": shape.control,
            "to_name": IMAGE_CONTROL,
            "original_width": mask.size_hw[1],
            "original_height": mask.size_hw[0],
            "image_rotation": 0,
            "value": value | {kind: [mask.label or DEFAULT_LABEL]},
            "score": round(_score(mask, limit=1.0), 4),
            "origin": "prediction",
        }
        regions.append(region | {"parentID": region_id} if part else region)
    return regions


def _score(mask: Mask, *, limit: float) -> float:
    """The predicted IoU cut to 0..limit. 0 if the model gave no number."""
    return min(max(mask.predicted_iou, 0.0), limit) if not math.isnan(mask.predicted_iou) else 0.0
