"""The surfaces of drawn scenes: pairs of colours, and the textures that mix them."""

from collections.abc import Callable
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

Canvas: TypeAlias = npt.NDArray[np.float32]  # (H, W, 3) RGB, about 0..255
Plane: TypeAlias = npt.NDArray[np.float32]  # (H, W)
Colour: TypeAlias = npt.NDArray[np.float32]  # (3,) RGB, 0..255


def colour_pair(rng: np.random.Generator, hue: float, *, value: float) -> tuple[Colour, Colour]:
    """Two colours of one material: mostly shades of one hue, sometimes very different."""
    saturation = rng.uniform(0.05, 0.85)
    first = _hsv(hue, saturation, value)
    if rng.random() < 0.2:
        return first, _hsv(rng.random(), rng.uniform(0.1, 0.9), rng.uniform(0.1, 1.0))
    step = rng.uniform(0.08, 0.4) * (-1 if value > 0.5 else 1)
    return first, _hsv(hue + 0.06 * rng.normal(), saturation * rng.uniform(0.5, 1.2), value + step)


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB 0..255 of hue 0..1 (wrapping), saturation and value 0..1 (clipped)."""
    s, v = min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0)
    distance = np.abs((np.array([hue, hue - 1 / 3, hue - 2 / 3]) + 0.5) % 1.0 - 0.5) * 6
    return np.asarray(255 * v * (1 - s * (1 - np.clip(2 - distance, 0, 1))), np.float32)


def paint(rng: np.random.Generator, size_hw: tuple[int, int], unit: float, colours: tuple[Colour, Colour]) -> Canvas:
    """One material over a rectangle: a texture, sometimes with a second, weaker one over it."""
    mix = _TEXTURES[rng.integers(len(_TEXTURES))](rng, size_hw, unit)
    if rng.random() < 0.3:
        mix = np.asarray(0.75 * mix + 0.25 * _grain(rng, size_hw, unit), np.float32)
    first, second = colours
    return np.stack([first[c] + (second[c] - first[c]) * mix for c in range(3)], axis=2)


def draw_noise(rng: np.random.Generator, size_hw: tuple[int, int], cell_px: float, octaves: int = 3) -> Plane:
    """Smooth noise 0..1 with a mean of about 0.5. Its coarsest grain is cell_px wide."""
    h, w = size_hw
    total = np.zeros(size_hw, np.float32)
    for octave in range(octaves):
        cell = max(cell_px / 2**octave, 1.5)
        grid = rng.random((int(h / cell) + 3, int(w / cell) + 3), np.float32)
        total += cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC) / 2**octave
    return np.asarray(np.clip(total / (2 - 0.5 ** (octaves - 1)), 0, 1), np.float32)


def _turned_grid(rng: np.random.Generator, size_hw: tuple[int, int]) -> tuple[Plane, Plane]:
    """Pixel coordinates along two perpendicular directions at a random angle."""
    angle = rng.uniform(0, np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x = np.arange(size_hw[1], dtype=np.float32)[None]
    y = np.arange(size_hw[0], dtype=np.float32)[:, None]
    return np.asarray(x * cos + y * sin), np.asarray(y * cos - x * sin)


def _sharpen(plane: Plane, gain: float) -> Plane:
    return np.asarray(np.clip(0.5 + (plane - 0.5) * np.float32(gain), 0, 1), np.float32)


# Textures. Each gives the share 0..1 of the second colour in every pixel.


def _flat(rng: np.random.Generator, size_hw: tuple[int, int], unit: float) -> Plane:
    return np.full(size_hw, rng.random(), np.float32)


def _gradient(rng: np.random.Generator, size_hw: tuple[int, int], unit: float) -> Plane:
    u, _ = _turned_grid(rng, size_hw)
    return np.asarray((u - u.min()) / max(float(np.ptp(u)), 1.0), np.float32)


def _grain(rng: np.random.Generator, size_hw: tuple[int, int], unit: float) -> Plane:
    return _sharpen(draw_noise(rng, size_hw, unit * rng.uniform(0.01, 0.12)), rng.uniform(1, 3))


def _spots(rng: np.random.Generator, size_hw: tuple[int, int], unit: float) -> Plane:
    return _sharpen(draw_noise(rng, size_hw, unit * rng.uniform(0.02, 0.06), 1), rng.uniform(6, 14))


def _stripes(rng: np.random.Generator, size_hw: tuple[int, int], unit: float) -> Plane:
    u, _ = _turned_grid(rng, size_hw)
    if rng.random() < 0.5:
        u = u + np.float32(unit * rng.uniform(0.02, 0.1)) * draw_noise(rng, size_hw, unit * 0.15, 1)
    wave = np.sin(u * np.float32(2 * np.pi / (unit * rng.uniform(0.02, 0.07))))
    return _sharpen(0.5 + 0.5 * wave, rng.uniform(1, 4))


def _checker(rng: np.random.Generator, size_hw: tuple[int, int], unit: float) -> Plane:
    u, v = _turned_grid(rng, size_hw)
    turn = np.float32(np.pi / (unit * rng.uniform(0.015, 0.05)))
    return _sharpen(0.5 + 0.5 * np.sin(u * turn) * np.sin(v * turn), rng.uniform(1.5, 6))


def _dots(rng: np.random.Generator, size_hw: tuple[int, int], unit: float) -> Plane:
    u, v = _turned_grid(rng, size_hw)
    turn = np.float32(2 * np.pi / (unit * rng.uniform(0.025, 0.06)))
    return _sharpen(0.5 + 0.5 * (np.cos(u * turn) + np.cos(v * turn) - np.float32(rng.uniform(0.2, 1.0))), 3)


_TEXTURES: tuple[Callable[[np.random.Generator, tuple[int, int], float], Plane], ...] = (
    _flat,
    _gradient,
    _gradient,
    _grain,
    _grain,
    _spots,
    _stripes,
    _checker,
    _dots,
)
