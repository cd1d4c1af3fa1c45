"""Masks as SVG outlines: sharp at any zoom, a few hundred characters each."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from db.results import StoredMask
from orchestrator.shapes.runs import crop_edges, edges_from_counts

GRID = 1280
"""The length of the frame's longer side, in the outlines' units."""

_MOST_CHARS = 10_000  # of one outline; most take 100 to 500
_MOST_RINGS = 500


def outline(mask: StoredMask, size_hw: tuple[int, int], *, tolerance: int = 1) -> str:
    """The mask's borders, holes too, as the `d` of an SVG path. The frame's longer side has GRID units.

    tolerance: the error in these units; 1 is half a pixel of a 640 px image. Fill it by the even-odd rule. Empty for an
    empty mask.
    """
    edges = edges_from_counts(mask.counts, size_hw)
    if edges.size == 0:
        return ""
    crop = crop_edges(edges, size_hw)
    # Resample to about the number of pixels on the page. This smooths the steps of small images, and saves time for
    # large ones.
    zoom = max(1, -(-GRID // max(size_hw)))
    step = max(1, max(size_hw) // GRID)
    borders, _ = cv2.findContours(_resample(crop.columns, zoom, step), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    unit = GRID / max(size_hw)
    # The crop is transposed: OpenCV's x is the image's y.
    corner = np.array([crop.top, crop.left]) - step
    longest = sorted(borders, key=len, reverse=True)[:_MOST_RINGS]
    lines = [(((border + 0.5) * step / zoom + corner) * unit).astype(np.float32) for border in longest]

    # A ragged mask gets coarser lines, until it fits.
    d = ""
    for coarser in (1, 2, 4, 8, 16, 32):
        d = "".join(_path(cv2.approxPolyDP(line, tolerance * coarser, True)[:, 0, ::-1]) for line in lines)
        if len(d) <= _MOST_CHARS:
            break
    return d or _dot(mask, unit)


def _resample(pixels: NDArray[np.uint8], zoom: int, step: int) -> NDArray[np.uint8]:
    """Enlarge (h, w) of 0 and 1 `zoom` times, or shrink it `step` times. It first gets a border of `step` zeros."""
    ends = [(step, step + -side % step) for side in pixels.shape]
    padded = np.pad(pixels, ends)
    if zoom == step:
        return padded
    size_wh = (padded.shape[1] * zoom // step, padded.shape[0] * zoom // step)
    smooth = cv2.resize(padded * np.uint8(255), size_wh, interpolation=cv2.INTER_LINEAR if zoom > 1 else cv2.INTER_AREA)
    return (smooth >= 128).astype(np.uint8)


def _path(points: NDArray[np.float32]) -> str:
    """A closed line (n, 2), x, y, as SVG commands in whole units from point to point."""
    if len(points) < 3:
        return ""
    whole = np.rint(points).astype(np.int64)
    x, y = whole[0]
    steps = np.diff(whole, axis=0)
    steps = steps[steps.any(axis=1)]
    return f"M{x} {y}l" + " ".join(f"{dx} {dy}" for dx, dy in steps.tolist()) + "z"


def _dot(mask: StoredMask, unit: float) -> str:
    """A small box for a mask that is too small for an outline."""
    x, y, w, h = (round(side * unit) for side in mask.bbox_xywh)
    return f"M{x} {y}h{max(1, w)}v{max(1, h)}h-{max(1, w)}z"
