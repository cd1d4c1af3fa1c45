"""Mask geometry: the `Mask` value that every model returns, and its run-length codec.

The frame is always the upright image (EXIF applied). Run lengths are COCO's compressed string, as in pycocotools:
column-major, starting with background.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

BoolMask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """One object's pixels with its scores, in the upright image's frame.

    counts: COCO compressed run lengths. size_hw: the frame in pixels. bbox_xywh: pixels, COCO's convention (x, y of the
    first pixel; width and height include the last one). predicted_iou: the model's own estimate, about 0..1 (SAM may
    exceed 1). stability_score: 0..1, None for a mask from a prompt. prompt: the prompt of this mask as stored in the
    database, e.g. {"points": [[x, y, 1]]} in upright pixels.
    """

    counts: str
    size_hw: tuple[int, int]
    bbox_xywh: tuple[float, float, float, float]
    area_px: int
    predicted_iou: float
    stability_score: float | None = None
    label: str | None = None
    prompt: dict[str, Any] | None = None


def encode_counts(mask: BoolMask) -> str:
    """Encode one mask, (H, W) bool, as COCO compressed run lengths.

    Raises ValueError for any other shape or dtype.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"mask has shape {mask.shape} and dtype {mask.dtype}, expected (H, W) bool")
    counts: bytes = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))["counts"]
    return counts.decode("ascii")


def decode_counts(counts: str, size_hw: tuple[int, int]) -> BoolMask:
    """The pixels (H, W) bool of COCO compressed run lengths.

    Raises ValueError unless these are the run lengths that `encode_counts` gives for a mask of this size.
    """
    try:
        rle = {"size": list(size_hw), "counts": counts.encode("ascii")}
        pixels: BoolMask = coco_mask.decode(rle).astype(np.bool_)
    except (ValueError, UnicodeEncodeError) as error:
        raise ValueError(
            f"counts {counts[:20]!r}: not the run lengths of {size_hw[0]} x {size_hw[1]} pixels"
        ) from error
    # Where the runs end too early, pycocotools returns whatever was in memory.
    if encode_counts(pixels) != counts:
        raise ValueError(f"counts {counts[:20]!r}: do not add up to {size_hw[0]} x {size_hw[1]} pixels")
    return pixels


def mask_from_pixels(
    pixels: BoolMask, *, predicted_iou: float, stability_score: float | None = None, label: str | None = None
) -> Mask:
    """Make a Mask from (H, W) bool pixels. The area and the box are computed from them."""
    height, width = pixels.shape
    counts = encode_counts(pixels)
    rle = {"size": [height, width], "counts": counts.encode("ascii")}
    x, y, w, h = (float(v) for v in coco_mask.toBbox(rle))
    return Mask(
        counts=counts,
        size_hw=(height, width),
        bbox_xywh=(x, y, w, h),
        area_px=int(coco_mask.area(rle)),
        predicted_iou=predicted_iou,
        stability_score=stability_score,
        label=label,
    )
