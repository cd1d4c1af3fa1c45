"""Images for YOLO's trainers. Trainers find images by the suffix of their names, and know only some suffixes.

A trainer skips other files without a message. The suffix that a file gets here fits its bytes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import cv2

from db.settings import settings
from workers.errors import AssetError
from workers.images.decode import decode
from workers.images.formats import sniff
from workers.images.headers import exif_orientation, webp_orientation
from workers.storage.asset import Source

# The suffixes that every version of ultralytics knows (data/utils.py, IMG_FORMATS). Newer ones know more.
_KNOWN_SUFFIXES = frozenset((".bmp", ".dng", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"))
_USUAL_SUFFIX = re.compile(r"\.[a-z0-9]{1,10}")
_SUFFIX_OF_FORMAT = {"JPEG": ".jpg", "PNG": ".png", "WebP": ".webp", "TIFF": ".tif", "BMP": ".bmp"}
# OpenCV, with which trainers read, does not turn a WebP, and its imread gives nothing for a TIFF on its side (4.12).
_TURNS: dict[str, Callable[[bytes], int]] = {"WebP": webp_orientation, "TIFF": exif_orientation}


def has_known_suffix(key: str) -> bool:
    """Whether a trainer takes a file of this name for an image."""
    return _suffix(key) in _KNOWN_SUFFIXES


def file_name(asset_id: int, key: str) -> str:
    """The name of an image whose bytes are not read: the asset's id, with the key's own suffix."""
    return f"{asset_id}{_suffix(key)}"


def read_image(source: Source, key: str) -> tuple[bytes, str]:
    """An image's bytes and their suffix.

    A picture that trainers read is not changed. Another, such as a GIF, becomes an upright PNG; so does a WebP or
    TIFF that its EXIF turns. Bytes that are no picture (any more) are not changed either. Raises AssetError for an
    image that cannot be fetched.
    """
    data = source.read(key, settings().max_object_bytes)
    try:
        kind, _ = sniff(data, key)
        if kind in _SUFFIX_OF_FORMAT and not (kind in _TURNS and _TURNS[kind](data) > 1):
            return data, _suffix(key) if has_known_suffix(key) else _SUFFIX_OF_FORMAT[kind]
        pixels = decode(data, name=key, max_pixels=settings().max_pixels)
    except AssetError:
        return data, _suffix(key)
    encoded, png = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    return (png.tobytes(), ".png") if encoded else (data, _suffix(key))


def write_image(data: bytes, targets: Sequence[Path]) -> None:
    """Write the image once. Its other names are links if the disk can do that, else copies."""
    targets[0].write_bytes(data)
    for target in targets[1:]:
        try:
            os.link(targets[0], target)
        except OSError:
            shutil.copyfile(targets[0], target)


def _suffix(key: str) -> str:
    """The key's suffix, or none where it is no usual one: a key may end with anything, of any length."""
    suffix = PurePosixPath(key).suffix.lower()
    return suffix if _USUAL_SUFFIX.fullmatch(suffix) else ""
