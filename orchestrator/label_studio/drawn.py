"""Regions that people drew, converted to masks in the asset's frame.

The JSON comes from a browser and is hostile. Numbers are bounded. A region that cannot be read raises RegionError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from orchestrator.label_studio.brush import BrushError, decode_brush
from orchestrator.shapes.rasterise import PolygonError, Ring, polygon_edges, ring_px
from orchestrator.shapes.runs import pixels_from_edges
from workers.masks import BoolMask

_MAX_POINTS = 100_000

# A region dragged off the picture is cut. One that is a hundred pictures away was not drawn by a person.
_MAX_PERCENT = 10_000.0

# At most 0.06 px away from a circle of 6,000 px radius.
_ELLIPSE_POINTS = 720


class RegionError(ValueError):
    """A region cannot be read as a mask."""


def mask_from_region(
    region: Mapping[str, Any], *, size_hw: tuple[int, int] | None = None, max_pixels: int = 100_000_000
) -> BoolMask:
    """Read a polygon, brush, magicwand, rectangle or ellipse region as (H, W) bool: the pixels whose centre it covers.

    size_hw: the asset's frame. The region's frame must be equal to it, or missing. Without size_hw the region's frame
    is used, up to max_pixels. Parts outside the frame are cut off. Raises RegionError for a region of another type or a
    damaged one.
    """
    frame = _frame(region, size_hw, max_pixels)
    kind, value = region.get("type"), region.get("value")
    if not isinstance(value, Mapping):
        raise RegionError(f"{_name(region)}: value is {type(value).__name__}, expected an object")
    try:
        if kind in ("brushlabels", "brush", "magicwand"):  # the wand writes a brush stream
            return decode_brush(value.get("rle"), frame)
        if kind in ("polygonlabels", "polygon"):
            ring = ring_px(_points(region, value), frame)
        elif kind in ("rectanglelabels", "rectangle"):
            ring = _rectangle_px(region, value, frame)
        elif kind in ("ellipselabels", "ellipse"):
            ring = _ellipse_px(region, value, frame)
        else:
            raise RegionError(
                f"{_name(region)}: type {kind!r:.50} has no mask; polygon, brush, rectangle, ellipse and magicwand have"
            )
        return pixels_from_edges(polygon_edges([ring], frame), frame)
    except (BrushError, PolygonError) as error:
        raise RegionError(f"{_name(region)}: {error}") from error


def _frame(region: Mapping[str, Any], size_hw: tuple[int, int] | None, max_pixels: int) -> tuple[int, int]:
    """The region's (height, width), checked."""
    known = size_hw or (None, None)
    frame = (_side(region, "original_height", known[0]), _side(region, "original_width", known[1]))
    if size_hw is not None and frame != size_hw:
        raise RegionError(
            f"{_name(region)}: drawn on {frame[::-1]} pixels (width, height), the image has {size_hw[::-1]}"
        )
    if size_hw is None and frame[0] * frame[1] > max_pixels:
        raise RegionError(f"{_name(region)}: frame of {frame[1]} x {frame[0]}, more than {max_pixels} pixels")
    if region.get("image_rotation") not in (None, 0):
        raise RegionError(f"{_name(region)}: drawn on the image turned by {region['image_rotation']!r:.50} degrees")
    return frame


def _side(region: Mapping[str, Any], name: str, known: int | None) -> int:
    """A side of the region's frame in pixels. `known` if the region has none; imported ones may have none."""
    side = region.get(name)
    if side is None and known is not None:
        return known
    if isinstance(side, float) and side.is_integer():
        side = int(side)
    if not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise RegionError(f"{_name(region)}: {name} is {side!r:.50}, expected a whole number of pixels")
    return side


def _points(region: Mapping[str, Any], value: Mapping[str, Any]) -> Ring:
    points = value.get("points")
    if not isinstance(points, list) or not 3 <= len(points) <= _MAX_POINTS:
        raise RegionError(f"{_name(region)}: expected a list of 3 to {_MAX_POINTS} points")
    try:
        ring = np.array(points)
    except ValueError as error:
        raise RegionError(f"{_name(region)}: points are not all [x, y]") from error
    if ring.ndim != 2 or ring.shape[1] != 2 or ring.dtype.kind not in "if" or not (np.abs(ring) <= _MAX_PERCENT).all():
        raise RegionError(f"{_name(region)}: points are not all [x, y] in percent of the image")
    return ring.astype(np.float64)


def _numbers(region: Mapping[str, Any], value: Mapping[str, Any], *names: str) -> list[float]:
    numbers = []
    for name in names:
        number = value.get(name, 0 if name == "rotation" else None)
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not abs(number) <= _MAX_PERCENT:
            raise RegionError(f"{_name(region)}: {name} is {number!r:.50}, expected a number, in percent or degrees")
        numbers.append(float(number))
    return numbers


def _rectangle_px(region: Mapping[str, Any], value: Mapping[str, Any], size_hw: tuple[int, int]) -> Ring:
    """Corners in pixels. Label Studio rotates a rectangle clockwise about its x, y corner."""
    x, y, width, height, rotation = _numbers(region, value, "x", "y", "width", "height", "rotation")
    corners = ring_px(np.array([[0.0, 0.0], [width, 0.0], [width, height], [0.0, height]]), size_hw)
    return _turned(corners, rotation) + ring_px(np.array([[x, y]]), size_hw)


def _ellipse_px(region: Mapping[str, Any], value: Mapping[str, Any], size_hw: tuple[int, int]) -> Ring:
    """Points in pixels. x, y is the centre. Radii are percent of width and height. It is rotated about the centre."""
    x, y, radius_x, radius_y, rotation = _numbers(region, value, "x", "y", "radiusX", "radiusY", "rotation")
    angle = np.linspace(0, 2 * np.pi, _ELLIPSE_POINTS, endpoint=False)
    rim = ring_px(np.stack((radius_x * np.cos(angle), radius_y * np.sin(angle)), axis=1), size_hw)
    return _turned(rim, rotation) + ring_px(np.array([[x, y]]), size_hw)


def _turned(ring: Ring, degrees: float) -> Ring:
    """Rotate about the origin, clockwise on the screen, where y points down."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned: Ring = ring @ np.array([[cos, sin], [-sin, cos]])
    return turned


def _name(region: Mapping[str, Any]) -> str:
    return f"region {region.get('id')!r:.60}"
