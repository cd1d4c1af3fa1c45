"""Draws scenes with exact masks: from a seed to an RGB image and its objects.

sam_nano is trained, measured and demonstrated only on these scenes. Every length is relative to `unit_px`, so the same
generator gives large scenes for the demo and small crops for training. It needs no torch, because other tests draw
scenes too.
"""

from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from workers.training.shapes import SHAPES, Contour, draw_blob, draw_ellipse
from workers.training.textures import Canvas, Colour, Plane, colour_pair, draw_noise, paint

RgbImage: TypeAlias = npt.NDArray[np.uint8]  # (H, W, 3), 0..255
Owner: TypeAlias = npt.NDArray[np.uint8]  # (H, W), 0 background, k the k-th object
BoolMasks: TypeAlias = npt.NDArray[np.bool_]  # (N, H, W)

# An object with a smaller visible part than this is too hidden: no person would be asked to find it.
MIN_VISIBLE_SHARE = 0.75
MIN_VISIBLE_UNITS2 = 0.004  # 1049 px in a 512 px scene, about 32 x 32 px


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One drawn image, and the object that owns each pixel."""

    image: RgbImage
    owner: Owner
    object_count: int

    @property
    def masks(self) -> BoolMasks:
        """The visible part of each object, (N, H, W) bool; disjoint, none empty."""
        ids = np.arange(1, self.object_count + 1, dtype=np.uint8)
        return np.asarray(self.owner[None] == ids[:, None, None])


def draw_scene(seed: int, size_hw: tuple[int, int] = (512, 512), *, unit_px: float | None = None) -> Scene:
    """Draw the scene of a seed. The same arguments give the same bytes.

    unit_px: the unit of length for objects and textures, by default the longer side. With a unit larger than the image,
    the image is a crop of a larger scene, and its border cuts objects.
    """
    rng = np.random.default_rng(seed)
    unit = float(unit_px or max(size_hw))
    style = _choose_style(rng)
    canvas = _draw_background(rng, size_hw, unit, style)
    owner = np.zeros(size_hw, np.uint8)
    full_areas = [0]
    wanted = max(1, min(250, round(style.objects_per_unit2 * size_hw[0] * size_hw[1] / unit**2)))
    for _ in range(wanted * 3):
        if len(full_areas) <= wanted:
            _place_object(rng, canvas, owner, full_areas, unit=unit, style=style)
    return Scene(image=_develop(rng, canvas, unit, style), owner=owner, object_count=len(full_areas) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    """The properties that all objects of one scene share."""

    hues: npt.NDArray[np.float64]
    background: tuple[Colour, Colour]
    uniform: tuple[Colour, Colour] | None  # all objects have these colours, like cells under a microscope
    objects_per_unit2: float
    radius_units: tuple[float, float]
    light_xy: tuple[float, float]
    shadow: float
    is_grey: bool


def _choose_style(rng: np.random.Generator) -> _Style:
    """Choose colours, light and number of objects at random. One scene in seven is a field of small, similar cells."""
    is_cells = rng.random() < 0.15
    hues = (rng.random() + rng.choice([0.12, 0.3, 0.5]) * rng.normal(size=4)) % 1.0
    background = colour_pair(rng, float(rng.random()), value=rng.uniform(0.1, 0.95))
    uniform = None
    if is_cells:
        value = rng.uniform(0.05, 0.35) if background[0].mean() > 128 else rng.uniform(0.7, 1.0)
        uniform = colour_pair(rng, float(hues[0]), value=value)
    angle = rng.uniform(0, 2 * np.pi)
    return _Style(
        hues=hues,
        background=background,
        uniform=uniform,
        objects_per_unit2=rng.uniform(12, 34) if is_cells else rng.uniform(6, 15),
        radius_units=(0.04, 0.08) if is_cells else (0.065, rng.uniform(0.15, 0.28)),
        light_xy=(float(np.cos(angle)), float(np.sin(angle))),
        shadow=0.0 if is_cells else float(rng.choice([0.0, rng.uniform(0.2, 0.6)])),
        is_grey=bool(rng.random() < (0.4 if is_cells else 0.06)),
    )


def _draw_background(rng: np.random.Generator, size_hw: tuple[int, int], unit: float, style: _Style) -> Canvas:
    """A material over the whole canvas, with a finer or coarser grain than the objects, sometimes out of focus."""
    canvas = paint(rng, size_hw, unit * rng.uniform(0.6, 1.8), style.background)
    if rng.random() < 0.35:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), unit * rng.uniform(0.003, 0.012)), np.float32)
    return canvas


def _place_object(
    rng: np.random.Generator, canvas: Canvas, owner: Owner, full_areas: list[int], *, unit: float, style: _Style
) -> None:
    """Draw one more object over the others. None if it would hide another object, or would hardly be visible itself."""
    h, w = owner.shape
    shapes = SHAPES if style.uniform is None else (draw_ellipse, draw_blob)
    contours = shapes[rng.integers(len(shapes))](rng)
    radius = unit * float(np.exp(rng.uniform(*np.log(style.radius_units))))
    margin = 0.3 * radius
    centre = np.array([rng.uniform(-margin, w + margin), rng.uniform(-margin, h + margin)], np.float32)
    drawn = _rasterise([contour @ _turn(rng, radius) + centre for contour in contours], (h, w))
    if drawn is None:
        return
    alpha, part = drawn
    inside = alpha >= 0.5
    area = int(np.count_nonzero(inside))
    least_area = MIN_VISIBLE_UNITS2 * unit**2
    # Cells do not overlap, and two thirds of the other objects do not either.
    least_share = MIN_VISIBLE_SHARE if style.uniform is None and rng.random() < 0.35 else 1.0
    hides = _hides_another(owner, part, inside, full_areas, least_share=least_share, least_area=least_area)
    if area < least_area or hides:
        return
    if style.shadow:
        _cast_shadow(canvas, alpha, part, unit, style)
    _lay(rng, canvas[part], alpha, unit, style)
    owner[part][inside] = len(full_areas)
    full_areas.append(area)


def _turn(rng: np.random.Generator, radius_px: float) -> npt.NDArray[np.float32]:
    """The matrix, for rows of xy, that scales to a radius and rotates by a random angle."""
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]], np.float32) * np.float32(radius_px)


def _rasterise(contours: list[Contour], size_hw: tuple[int, int]) -> tuple[Plane, tuple[slice, slice]] | None:
    """Coverage 0..1 over the rectangle of the canvas that the contours touch, and the rectangle. None if outside."""
    low = np.floor(np.maximum(contours[0].min(axis=0) - 2, 0)).astype(int)
    high = np.ceil(np.minimum(contours[0].max(axis=0) + 3, size_hw[::-1])).astype(int)
    if (high - low < 3).any():
        return None
    alpha = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
    # Four bits of sub-pixel position. Even-odd filling: the second contour cuts a hole.
    fixed = [np.round((contour - low) * 16).astype(np.int32) for contour in contours]
    cv2.fillPoly(alpha, fixed, (255,), lineType=cv2.LINE_AA, shift=4)
    return np.asarray(alpha / np.float32(255), np.float32), np.s_[low[1] : high[1], low[0] : high[0]]


def _hides_another(
    owner: Owner,
    part: tuple[slice, slice],
    inside: npt.NDArray[np.bool_],
    full_areas: list[int],
    *,
    least_share: float,
    least_area: float,
) -> bool:
    """True when too small a share of an earlier object, or too few of its pixels, would stay visible."""
    covered = np.bincount(owner[part][inside], minlength=len(full_areas))
    for index in np.flatnonzero(covered[1:]) + 1:
        left = np.count_nonzero(owner == index) - covered[index]
        if left < max(least_share * full_areas[index], least_area):
            return True
    return False


def _cast_shadow(canvas: Canvas, alpha: Plane, part: tuple[slice, slice], unit: float, style: _Style) -> None:
    """Darken the canvas beside the object, on the side away from the light. Works in place."""
    reach = max(2, round(unit * 0.02))
    framed = cv2.copyMakeBorder(alpha, reach, reach, reach, reach, cv2.BORDER_CONSTANT)
    soft = cv2.GaussianBlur(framed, (0, 0), unit * 0.006)
    x = part[1].start - reach - round(style.light_xy[0] * unit * 0.012)
    y = part[0].start - reach - round(style.light_xy[1] * unit * 0.012)
    x0, y0 = max(x, 0), max(y, 0)
    target = canvas[y0 : max(y + soft.shape[0], 0), x0 : max(x + soft.shape[1], 0)]
    shade = soft[y0 - y : y0 - y + target.shape[0], x0 - x : x0 - x + target.shape[1]]
    target *= 1 - np.float32(style.shadow) * shade[..., None]


def _lay(rng: np.random.Generator, target: Canvas, alpha: Plane, unit: float, style: _Style) -> None:
    """Paint one textured, shaded object over its rectangle of the canvas, in place."""
    h, w = alpha.shape
    surface = paint(rng, (h, w), unit, style.uniform or _object_colours(rng, style, target[alpha >= 0.5]))
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, w, dtype=np.float32)[None]
    slope = np.float32(rng.uniform(0, 0.4))
    shade = 1 + slope * (np.float32(style.light_xy[0]) * x + np.float32(style.light_xy[1]) * y)
    if rng.random() < 0.5:
        # A rounded edge is darker near the border.
        depth = cv2.distanceTransform((alpha >= 0.5).astype(np.uint8), cv2.DIST_L2, 3)
        rim = 1 - np.clip(depth / np.float32(unit * rng.uniform(0.006, 0.03)), 0, 1)
        shade = shade * (1 - np.float32(rng.uniform(0.2, 0.6)) * rim**2)
    target += alpha[..., None] * (surface * shade[..., None] - target)


def _object_colours(rng: np.random.Generator, style: _Style, covered: Canvas) -> tuple[Colour, Colour]:
    """Colours that mostly differ from the background's colours and from the covered pixels. covered: (P, 3)."""
    others = np.stack([(style.background[0] + style.background[1]) / 2, covered.mean(axis=0)])
    apart = 100.0 if rng.random() < 0.9 else 60.0
    for _ in range(12):
        pair = colour_pair(rng, float(rng.choice(style.hues)), value=rng.uniform(0.1, 1.0))
        if np.linalg.norm((pair[0] + pair[1]) / 2 - others, axis=1).min() > apart:
            break
    return pair


def _develop(rng: np.random.Generator, canvas: Canvas, unit: float, style: _Style) -> RgbImage:
    """Add the effects of light, lens and sensor: uneven light, contrast, blur, noise."""
    h, w = canvas.shape[:2]
    unevenness = np.float32(rng.uniform(0, 0.5))
    light = 1 + unevenness * (draw_noise(rng, (h, w), unit * 0.7, 1) - 0.5)
    canvas = canvas * light[..., None]
    if style.is_grey:
        canvas = np.repeat(canvas @ np.array([[0.299], [0.587], [0.114]], np.float32), 3, axis=2)
    canvas = (canvas - 128) * np.float32(rng.uniform(0.7, 1.1)) + np.float32(128 + rng.uniform(-20, 20))
    blur_px = unit * rng.uniform(0, 0.0035)
    if blur_px > 0.3:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), blur_px), np.float32)
    grain = np.float32(rng.choice([0, 3, 8, 12]) * rng.random())
    canvas = canvas + rng.standard_normal(canvas.shape, np.float32) * grain
    return np.clip(canvas, 0, 255).astype(np.uint8)
