"""The outlines of drawn objects: contours around 0 with a radius of about 1. A contour inside another is a hole."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Contour: TypeAlias = npt.NDArray[np.float32]  # (P, 2) xy
Floats: TypeAlias = npt.NDArray[np.floating]


def draw_ellipse(rng: np.random.Generator) -> list[Contour]:
    return [_circle() * np.array([1, rng.uniform(0.5, 1)], np.float32)]


def draw_blob(rng: np.random.Generator) -> list[Contour]:
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radius = np.ones(64)
    for wave in range(2, 6):
        radius += rng.normal() * 0.32 / wave * np.cos(wave * angle + rng.uniform(0, 6))
    return [_polar(angle, np.clip(radius, 0.35, 1.4) / 1.2)]


def _polygon(rng: np.random.Generator) -> list[Contour]:
    corners = int(rng.integers(3, 8))
    angle = (np.arange(corners) + rng.uniform(-0.28, 0.28, corners)) * 2 * np.pi / corners
    return [_polar(angle, rng.uniform(0.8, 1.0, corners))]


def _rectangle(rng: np.random.Generator) -> list[Contour]:
    return [_box(1.0, rng.uniform(0.4, 1.0))]


def _star(rng: np.random.Generator) -> list[Contour]:
    tips = int(rng.integers(4, 8))
    angle = np.arange(2 * tips) * np.pi / tips
    return [_polar(angle, np.where(np.arange(2 * tips) % 2, rng.uniform(0.45, 0.7), 1.05))]


def _flower(rng: np.random.Generator) -> list[Contour]:
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    return [_polar(angle, 0.82 + rng.uniform(0.1, 0.22) * np.cos(int(rng.integers(3, 9)) * angle))]


def _ring(rng: np.random.Generator) -> list[Contour]:
    outer = _circle() * np.array([1, rng.uniform(0.75, 1)], np.float32)
    return [outer, outer * np.float32(rng.uniform(0.4, 0.65))]


def _frame(rng: np.random.Generator) -> list[Contour]:
    outer = _box(1.0, rng.uniform(0.65, 1.0))
    return [outer, outer * np.float32(rng.uniform(0.45, 0.65))]


def _bar(rng: np.random.Generator) -> list[Contour]:
    return [_box(1.5, rng.uniform(0.14, 0.3))]


def _cross(rng: np.random.Generator) -> list[Contour]:
    a = rng.uniform(0.22, 0.4)
    arm = np.array([(a, a), (a, 1), (-a, 1)], np.float32)
    quarter = np.array([(0, 1), (-1, 0)], np.float32)
    return [np.concatenate([arm @ np.linalg.matrix_power(quarter, turn) for turn in range(4)])]


def _letter(rng: np.random.Generator) -> list[Contour]:
    """L, T or U in thick strokes."""
    a = rng.uniform(0.4, 0.65)
    b, c = a - 1, 1 - a
    letters = (
        [(-1, -1), (b, -1), (b, c), (1, c), (1, 1), (-1, 1)],
        [(-1, -1), (1, -1), (1, b), (a / 2, b), (a / 2, 1), (-a / 2, 1), (-a / 2, b), (-1, b)],
        [(-1, -1), (b, -1), (b, c), (c, c), (c, -1), (1, -1), (1, 1), (-1, 1)],
    )
    return [np.array(letters[rng.integers(3)], np.float32) * np.float32(0.9)]


def _crescent(rng: np.random.Generator) -> list[Contour]:
    half = rng.uniform(1.6, 2.5)
    angle = np.linspace(-half, half, 40)
    width = 0.2 + 0.45 * np.cos(angle / half * np.pi / 2)
    return [np.concatenate([_polar(angle, np.ones(40)), _polar(angle, 1 - width)[::-1]])]


SHAPES: tuple[Callable[[np.random.Generator], list[Contour]], ...] = (
    draw_ellipse,
    draw_ellipse,
    draw_blob,
    draw_blob,
    draw_blob,
    _polygon,
    _polygon,
    _rectangle,
    _star,
    _flower,
    _ring,
    _frame,
    _bar,
    _cross,
    _letter,
    _crescent,
)


def _circle() -> Contour:
    return _polar(np.linspace(0, 2 * np.pi, 48, endpoint=False), np.ones(48))


def _polar(angle: Floats, radius: Floats) -> Contour:
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1).astype(np.float32)


def _box(half_width: float, half_height: float) -> Contour:
    w, h = half_width, half_height
    return np.array([(-w, -h), (w, -h), (w, h), (-w, h)], np.float32)
