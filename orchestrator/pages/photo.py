"""A photo for a page: a small JPEG, and its masks as outlines over it."""

from __future__ import annotations

import colorsys
import logging

import cv2
import numpy as np

from db.results import LabeledAsset, StoredMask
from orchestrator.pages.page import safe_text
from orchestrator.shapes.colours import label_colour
from orchestrator.shapes.outlines import GRID, outline
from workers.images.decode import thumbnail_jpeg
from workers.images.pixels import RgbImage

log = logging.getLogger(__name__)
_PHOTO_SIDE_PX = 1280
_PHOTO_QUALITY = 82
_MASKS_CHARS = 40_000  # for all outlines of an asset: enough for 100 masks of a busy scene


def instance_colour(n: int) -> str:
    """The nth colour, #rrggbb. Hues are a golden ratio of the circle apart, so colours of near numbers differ."""
    rgb = colorsys.hls_to_rgb((0.47 + n * 0.618033988749895) % 1, (0.55, 0.62, 0.48)[n % 3], 0.85)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


def small_jpeg(image: RgbImage, most_bytes: int) -> bytes:
    """Shrink the image until its JPEG has at most most_bytes. A few tries are enough: bytes grow about with pixels."""
    height, width = image.shape[:2]
    side = min(_PHOTO_SIDE_PX, max(height, width))
    if max(height, width) > side:
        # Averaging to the first size is 10 times as fast as Pillow's filter, which takes 0.1 s for 12 MP.
        scale = side / max(height, width)
        size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    jpeg = thumbnail_jpeg(image, side, _PHOTO_QUALITY)
    while len(jpeg) > most_bytes and side > 64:
        side = int(side * min(0.9, 0.95 * (most_bytes / len(jpeg)) ** 0.5))
        jpeg = thumbnail_jpeg(image, side, _PHOTO_QUALITY)
    return jpeg


def mask_outlines(asset: LabeledAsset, *, by_label: bool) -> tuple[str, int]:
    """The masks as SVG, large ones below small ones, and the number of masks that did not fit."""
    height, width = asset.size_hw
    unit = GRID / max(height, width)
    paths: list[str] = []
    room = _MASKS_CHARS
    left_out = 0
    for mask in sorted(asset.masks, key=lambda mask: (-mask.area_px, mask.n)):
        path = _mask_path(mask, asset.size_hw, by_label=by_label) if room > 0 else ""
        room -= len(path)
        left_out += not path
        paths.append(path)
    box = f"0 0 {width * unit:.1f} {height * unit:.1f}"
    return f'<svg class="masks" viewBox="{box}" aria-hidden="true">{"".join(paths)}</svg>', left_out


def _mask_path(mask: StoredMask, size_hw: tuple[int, int], *, by_label: bool) -> str:
    try:
        d = outline(mask, size_hw)
    except ValueError as error:
        log.warning("cannot draw mask %d of asset %d: %s", mask.n, mask.asset_id, error)
        return ""
    colour = label_colour(mask.label) if by_label and mask.label is not None else instance_colour(mask.n)
    scores = f' data-area="{mask.area_px}" data-iou="{mask.predicted_iou:.2f}"'
    if mask.stability_score is not None:
        scores += f' data-stability="{mask.stability_score:.2f}"'
    if mask.label is not None:
        scores += f' data-label="{safe_text(mask.label)}"'
    return f'<path color="{colour}" data-n="{mask.n}"{scores} d="{d}"/>' if d else ""
