"""Pillow's pixels to upright RGB: 16 bits scaled to 8, transparency over white, turned as EXIF says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from pi_heif.as_plugin import HeifImageFile
from PIL import Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from workers.images.headers import exif_orientation

RgbImage = npt.NDArray[np.uint8]
"""(H, W, 3) uint8, C-contiguous, channels red, green, blue in 0..255, upright."""
STRIP_PIXELS = 2**18  # fits the cache; 12 MP took 70 ms by strips, 100 ms whole (2026-11)


def upright_rgb(image: ImageFile) -> RgbImage:
    """Convert a loaded picture strip by strip. Each strip is written to its upright place in one array."""
    width, height = image.size
    # Pillow turns a TIFF on loading, and libheif turns a HEIC as its boxes say. Then EXIF repeats that, or is wrong.
    # The others have their turn in the EXIF block. For an AVIF, Pillow puts it there from the boxes.
    is_turned = isinstance(image, (TiffImageFile, HeifImageFile))
    orientation = 1 if is_turned else exif_orientation(image.info.get("exif"))
    upright = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
    stored = _as_stored(upright, orientation)
    to_rgb = _converter(image)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        stored[top:bottom] = to_rgb(image.crop((0, top, width, bottom)))
    return upright


def _as_stored(upright: RgbImage, orientation: int) -> RgbImage:
    """A view of the upright array, in the frame of the file. orientation: EXIF's 1..8 (Exif 3.0, tag 274)."""
    view = upright.transpose(1, 0, 2) if orientation >= 5 else upright
    if orientation in (3, 4, 6, 7):
        view = view[::-1]
    if orientation in (2, 3, 7, 8):
        view = view[:, ::-1]
    return view


def _converter(image: ImageFile) -> Callable[[Image.Image], npt.NDArray[np.uint8]]:
    """The function that converts a strip of this picture to (rows, W, 3) uint8 RGB."""
    if image.mode.startswith("I;16"):
        bits, white_is_zero = 16, False
        if isinstance(image, TiffImageFile):
            bits, white_is_zero = image.tag_v2.get(258, (16,))[0], image.tag_v2.get(262, 0) == 0
        return lambda strip: _from_16_bit(strip, 2**bits - 1, white_is_zero=white_is_zero)
    if image.mode == "LAB":
        transform = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), inMode="LAB", outMode="RGB"
        )
        return lambda strip: np.asarray(ImageCms.applyTransform(strip, transform))
    if isinstance(image, BmpImageFile) and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return lambda strip: np.asarray(strip.convert("RGB"))  # a writer left the alpha empty; browsers show it opaque
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return _over_white
    return lambda strip: np.asarray(strip.convert("RGB"))


def _from_16_bit(strip: Image.Image, largest: int, *, white_is_zero: bool) -> npt.NDArray[np.uint8]:
    """Scale grey 0..largest to 0..255, rounded. Pillow's own conversion makes everything above 255 white."""
    samples = np.asarray(strip).astype(np.uint32)
    grey = ((samples * 255 + largest // 2) // largest).astype(np.uint8)
    if white_is_zero:
        grey = 255 - grey
    transparent = strip.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return np.repeat(grey[..., None], 3, axis=2)


def _over_white(strip: Image.Image) -> npt.NDArray[np.uint8]:
    # In Pillow this is the only way from grey with premultiplied alpha to RGBA.
    picture = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
