"""The outlines of many masks at once, traced along pixel borders."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.shapes.runs import Crop


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlines:
    """Every border of a mask, exact: it passes through the midpoints of the sides between its pixels and the others.

    lines: one for each border, (n, 1, 2) float32, x, y in pixels from (left, top). Outer borders and holes run in
    opposite directions. The largest comes first, so a hole comes after its outer border. areas: pixels inside each
    border. parents: the outer border of each hole, -1 for an outer border. perimeter: the total number of pixel sides.
    left, top: pixels in the frame.
    """

    lines: list[NDArray[np.float32]]
    areas: list[float]
    parents: list[int]
    perimeter: int
    left: int
    top: int


def trace_outlines(crops: list[Crop]) -> list[Outlines]:
    """Turn OpenCV's borders, which run through pixel centres, into borders between the pixels.

    A border visits pixels. At each pixel, the sides that face out lie between the direction from which the border came
    and the direction in which it leaves. Their order is that of Suzuki and Abe's border following (1985), which OpenCV
    implements. Pixels that touch at a corner are joined.
    """
    found = [cv2.findContours(crop.columns, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE) for crop in crops]
    contours = [contour for borders, _ in found for contour in borders]
    ends = np.cumsum([len(contour) for contour in contours])
    pixels = np.concatenate(contours)[:, 0, :].astype(np.int64)

    # Which sides face out at each visit.
    code = pixels[:, 0] + 3 * pixels[:, 1]
    following = successors(ends)
    leaves = _COMPASS_OF_STEP.take(code[following] - code + 4)
    came = np.empty_like(leaves)
    came[following] = _OPPOSITE.take(leaves)
    turn = came * 9 + leaves
    sides = _SIDES.take(turn)
    stops = sides.cumsum()
    index = np.arange(int(stops[-1])) + (4 * turn - stops + sides).repeat(sides)
    # The crops are transposed: OpenCV's x is the image's y. The table takes that into account.
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
) -> Outlines:
    """One mask's outlines. borders: (start, end, area) in the points. parents: the outer border of each hole."""
    order = sorted(range(len(borders)), key=lambda border: -borders[border][2])
    place = {border: n for n, border in enumerate(order)}
    return Outlines(
        lines=[points[borders[n][0] : borders[n][1], None, :] for n in order],
        areas=[borders[n][2] for n in order],
        parents=[place.get(parents[n], -1) for n in order],
        perimeter=borders[-1][1] - borders[0][0],
        left=crop.left,
        top=crop.top,
    )


def _areas(points: NDArray[np.float32], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    """Areas of closed lines in either direction. Shoelace formula."""
    x, y = points[:, 0].astype(np.float64), points[:, 1].astype(np.float64)
    following = successors(ends)
    areas: NDArray[np.float64] = np.abs(np.add.reduceat(x * y[following] - x[following] * y, starts)) / 2
    return areas


def successors(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The index of the next point after each point, (points,). Closed lines follow each other and end before `ends`."""
    following = np.arange(1, int(ends[-1]) + 1)
    following[ends[0] - 1] = 0
    following[ends[1:] - 1] = ends[:-1]
    return following


def _border_tables() -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Four tables by compass direction: 0 to 7 in 45-degree turns from OpenCV's +x to its +y; 8: a border of one pixel.

    1. From a step (3 * dy + dx + 4) to its direction.
    2. From a direction to its opposite.
    3. From a turn (9 * direction it came from + direction it leaves to) to the number of sides that face out.
    4. From 4 * turn + the side's number to the side's midpoint in the image, x and y from the corner of the pixel.
    """
    compass = np.array([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
    of_step = np.full(9, 8)
    of_step[compass @ (1, 3) + 4] = np.arange(8)
    opposite = np.array([4, 5, 6, 7, 0, 1, 2, 3, 8])
    sides = np.zeros((9, 9), np.intp)
    midpoints = np.zeros((9, 9, 4, 2), np.float32)
    for came, leaves in itertools.product(range(9), repeat=2):
        # Turn from where it came to where it leaves. At the end of a line, and for a single pixel, it is a whole turn.
        turns = range(1, (came - leaves) % 8 or 8) if came < 8 else range(8)
        facing = [(came - turn) % 8 for turn in turns if (came - turn) % 2 == 0]
        sides[came, leaves] = len(facing)
        for nth, direction in enumerate(facing):
            midpoints[came, leaves, nth] = 0.5 + compass[direction][::-1] / 2
    return of_step, opposite, sides.ravel(), midpoints.reshape(-1, 2)


_COMPASS_OF_STEP, _OPPOSITE, _SIDES, _MIDPOINTS = _border_tables()
