"""A photo for a page: read from the job's source, a small JPEG, and its masks as outlines over it."""

from __future__ import annotations

import base64
import colorsys
import logging
from collections.abc import Callable

import cv2
import numpy as np

from db.results import LabeledAsset, StoredMask
from db.settings import settings
from orchestrator.pages.page import safe_text
from orchestrator.shapes.colours import label_colour
from orchestrator.shapes.outlines import GRID, outline
from workers.errors import AssetError, SourceError, TransientError
from workers.images.decode import decode, thumbnail_jpeg
from workers.images.pixels import RgbImage
from workers.storage.source import open_source

MASKS_CHARS = 40_000
"""For all outlines of an asset: enough for 100 masks of a busy scene."""

ReadPhoto = Callable[[str], RgbImage]
CANNOT_BE_READ = (AssetError, TransientError, SourceError)
"""What reading a photo raises."""

_PHOTO_SIDE_PX = 1280
_PHOTO_QUALITY = 82
_SMALL_PHOTO_BYTES, _SMALL_PHOTO_QUALITY = 60_000, 70  # then more pixels show more than finer ones
_FINE_CHARS, _COARSE_UNITS = 20_000, 3  # with less room for them, outlines are coarser: a small photo shows no more

log = logging.getLogger(__name__)


def photos_of(source: str) -> ReadPhoto:
    """What reads the photo of a key of this source, upright. It raises CANNOT_BE_READ."""
    opened = open_source(source, s3_endpoint=settings().s3_endpoint)

    def read(key: str) -> RgbImage:
        content = opened.read(key, settings().max_object_bytes)
        return decode(content, name=key, max_pixels=settings().max_pixels)

    return read


def embedded_photo(
    read: ReadPhoto,
    key: str,
    most_bytes: int,
    size_hw: tuple[int, int] | None = None,
    window: tuple[slice, slice] = (slice(None), slice(None)),
) -> str:
    """The photo inside the page, or what is wrong with it. size_hw: of the masks over it, when it must have that.

    window: the rows and columns that are shown.
    """
    try:
        image = read(key)
        if size_hw is not None and image.shape[:2] != size_hw:
            return '<span class="gone">The image has changed since then.</span>'
        jpeg = small_jpeg(np.ascontiguousarray(image[window]), most_bytes)
    except CANNOT_BE_READ as error:
        log.warning("the page has no photo of %s: %s", key, error)
        why = str(error.kind) if isinstance(error, AssetError) else "the store does not answer"
        return f'<span class="gone">The image cannot be read any more: {safe_text(why)}.</span>'
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode("ascii")}" alt="{safe_text(key)}">'


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
    quality = _PHOTO_QUALITY if most_bytes > _SMALL_PHOTO_BYTES else _SMALL_PHOTO_QUALITY
    jpeg = thumbnail_jpeg(image, side, quality)
    while len(jpeg) > most_bytes and side > 64:
        side = int(side * min(0.9, 0.95 * (most_bytes / len(jpeg)) ** 0.5))
        jpeg = thumbnail_jpeg(image, side, quality)
    return jpeg


def mask_outlines(asset: LabeledAsset, *, by_label: bool, room: int = MASKS_CHARS) -> tuple[str, int]:
    """The masks as SVG, large ones below small ones, and the number of masks that did not fit.

    room: characters for the outlines of all masks, about.
    """
    height, width = asset.size_hw
    unit = GRID / max(height, width)
    tolerance = 1 if room >= _FINE_CHARS else _COARSE_UNITS
    paths: list[str] = []
    left_out = 0
    for mask in sorted(asset.masks, key=lambda mask: (-mask.area_px, mask.n)):
        path = _mask_path(mask, asset.size_hw, tolerance, by_label=by_label) if room > 0 else ""
        room -= len(path)
        left_out += not path
        paths.append(path)
    box = f"0 0 {width * unit:.1f} {height * unit:.1f}"
    return f'<svg class="masks" viewBox="{box}" aria-hidden="true">{"".join(paths)}</svg>', left_out


def _mask_path(mask: StoredMask, size_hw: tuple[int, int], tolerance: int, *, by_label: bool) -> str:
    try:
        d = outline(mask, size_hw, tolerance=tolerance)
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
