"""Turns an asset's bytes into upright RGB pixels. Only here is a picture turned as its EXIF says.

The content decides how a file is decoded, never its name. A file is refused from its header, before any pixel is
decoded. All masks, boxes and sizes of the project are in the frame that `decode` returns. Browsers show the same frame.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
import zlib

import pi_heif
from PIL import Image, ImageCms, TiffImagePlugin
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from workers.errors import AssetError, ErrorKind
from workers.images.boxes import BoxError, count_pixels, is_cut
from workers.images.formats import Opener, sniff
from workers.images.headers import (
    MAX_PIECES,
    MAX_RUN_LENGTH_BYTES,
    MAX_TIFF_VALUES,
    count_scans,
    has_run_lengths,
    outline,
)
from workers.images.pixels import RgbImage, upright_rgb
from workers.images.tiff import read_entries, read_layout, why_misread

MAX_PIXELS = 100_000_000
MAX_BYTES = 200 * 2**20
MAX_SCAN_PIXELS = 5_000_000_000
"""Pixels times scans of a JPEG: at most half a minute of decoding (2 to 6 ns each, EPYC Zen5, 2026-11). Encoders write
about ten scans. A picture of 100 MP may have fifty. A few kilobytes can hold thousands."""

MAX_PARTS = 5
"""A HEIC or AVIF may be made of five times the pixels that a picture may have. The picture and its transparency, each
made of tiles, are four times; tiles also reach over the edge. A few kilobytes can name a thousand tiles of 100 MP."""

# warnings.catch_warnings changes the whole process and is not safe in threads. So Pillow's warnings are turned off
# once, here. They are mostly about broken metadata. They do not change pixels, or they also come as an error.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

TiffImagePlugin.READ_LIBTIFF = True  # uncompressed TIFFs too: Pillow's own reader loses half of 16 bits in planes
pi_heif.options.DECODE_THREADS = 1  # a thread's tile may be as large as the picture; assets run in parallel


def decode(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> RgbImage:
    """Decode a picture: its first page or frame, upright, transparency over white.

    data: JPEG (MPO), PNG, WebP, TIFF, BMP, GIF, HEIC or AVIF (the primary picture). More than 8 bits a channel are
    scaled to 8, full range to full range. Colour profiles are not applied. name: for messages only.
    Raises AssetError: not_image, unsupported, too_large (bytes or pixels), truncated (cut or damaged),
    decode_timeout (a JPEG of so many scans that decoding it would take minutes).
    At the limit of 100 MP: 5 s, HEIC up to 10 s, and 0.7 GB besides `data` (JPEG, PNG, BMP, GIF), 0.9 GB (HEIC, TIFF
    in one strip), 1.2 GB (progressive JPEG, AVIF) or 1.7 GB (WebP). Measured 2026-11, EPYC Zen5. Several threads may
    decode at once.
    """
    if len(data) > MAX_BYTES:
        raise AssetError(ErrorKind.TOO_LARGE, f"{name}: {len(data):,} bytes; at most {MAX_BYTES:,} are decoded")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # some formats check Pillow's own limit first; it is never lowered
    kind, opener = sniff(data, name)
    _refuse_unopened(data, name, kind, max_pixels)
    image = _open(data, name, kind, opener)
    if kind == "PNG":
        _scale_transparent_colour(image, bits=int.from_bytes(data[24:25], "big"))
    _refuse_by_header(image, data, name, max_pixels)
    # Pillow turns a TIFF on loading. Without an Orientation tag it would take the turn from XMP, which programs leave
    # there after they have turned the pixels. It also fails on XMP that is not bytes.
    image.info.pop("xmp", None)
    frame = image.tile[0].extents if kind == "GIF" and image.tile else None  # empty after loading
    try:
        image.load()
        return _over_white_canvas(upright_rgb(image), frame)
    except MemoryError as error:
        raise AssetError(ErrorKind.TOO_LARGE, f"{name}: {kind} of {_size(image)}: not enough memory") from error
    except _PILLOW_RAISES as error:
        if _UNSUPPORTED_WORDS.search(str(error)):
            raise AssetError(ErrorKind.UNSUPPORTED, f"{name}: {kind} of {_size(image)}: {_line(error)}") from error
        what = f"{name}: {kind} of {_size(image)}, {len(data):,} bytes: cut off or damaged"
        raise AssetError(ErrorKind.TRUNCATED, f"{what} ({_line(error)}); upload it again") from error


def thumbnail_jpeg(image: RgbImage, longest_side: int, quality: int = 80) -> bytes:
    """A JPEG of the picture. Its longer side has at most `longest_side` pixels; smaller pictures keep their size.

    image: (H, W, 3) uint8 RGB. quality: 1..95, as libjpeg has it.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


# What Pillow raises on hostile bytes. Not Exception: an error in our code must not blame the asset.
_PILLOW_RAISES = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AttributeError),
    *(NotImplementedError, RuntimeError, AssertionError, struct.error, zlib.error),
    *(Image.DecompressionBombError, ImageCms.PyCMSError),
)
_UNSUPPORTED_WORDS = re.compile(
    r"unsupported|not supported|not available|not been built in|unknown|not implemented|unrecognized mode", re.I
)


def _open(data: bytes, name: str, kind: str, opener: Opener) -> ImageFile:
    """Read only the header, after its length was checked."""
    try:
        return opener(io.BytesIO(data))
    except (Image.DecompressionBombError, MemoryError) as error:
        raise AssetError(ErrorKind.TOO_LARGE, f"{name}: {kind}: {_line(error)}") from error
    except _PILLOW_RAISES as error:
        reason = f"({_line(error)}; starts {data[:32]!r})"
        if "Decompressed data too large" in str(error):
            message = f"{name}: {kind} with a text or profile chunk that inflates without end"
            raise AssetError(ErrorKind.TOO_LARGE, message) from error
        if outline(data, kind)[1] > len(data):
            raise AssetError(ErrorKind.TRUNCATED, f"{name}: {kind} of {len(data):,} bytes, cut off {reason}") from error
        if _UNSUPPORTED_WORDS.search(str(error)):
            layout = f" of {read_layout(data)}" if kind == "TIFF" else ""
            message = f"{name}: a kind of {kind} that is not decoded{layout} {reason}"
            raise AssetError(ErrorKind.UNSUPPORTED, message) from error
        message = f"{name}: starts as {kind}, but its header makes no sense {reason}"
        raise AssetError(ErrorKind.NOT_IMAGE, message) from error


def _scale_transparent_colour(image: ImageFile, *, bits: int) -> None:
    """A PNG names its transparent colour in samples of `bits` bits. Pillow keeps that, but has 8-bit samples."""
    colour = image.info.get("transparency")
    if isinstance(colour, int) and image.mode == "L" and bits in (2, 4):
        image.info["transparency"] = colour * 255 // (2**bits - 1)
    elif isinstance(colour, tuple) and bits == 16:
        image.info["transparency"] = tuple(sample >> 8 for sample in colour)


def _over_white_canvas(pixels: RgbImage, frame: tuple[int, int, int, int] | None) -> RgbImage:
    """White outside a GIF's first frame (x0, y0, x1, y1), where browsers see through. Pillow has the first colour."""
    if frame is not None:
        x0, y0, x1, y1 = frame
        pixels[:y0], pixels[y1:], pixels[:, :x0], pixels[:, x1:] = 255, 255, 255, 255
    return pixels


def _refuse_unopened(data: bytes, name: str, kind: str, max_pixels: int) -> None:
    """Raise AssetError if even reading the header would take long, or if the pixels would be wrong."""
    if outline(data, kind)[0] > MAX_PIECES:
        message = f"{name}: {kind} in more than {MAX_PIECES:,} pieces, minutes of decoding; save it again"
        raise AssetError(ErrorKind.DECODE_TIMEOUT, message)
    if kind == "BMP" and len(data) > MAX_RUN_LENGTH_BYTES and has_run_lengths(data):
        message = f"{name}: BMP of {len(data):,} bytes in run lengths, minutes of decoding; save it as PNG"
        raise AssetError(ErrorKind.DECODE_TIMEOUT, message)
    if kind == "TIFF":
        entries = read_entries(data, MAX_PIECES)
        if any(entry.count > MAX_TIFF_VALUES and entry.end <= len(data) for entry in entries):
            raise AssetError(ErrorKind.TOO_LARGE, f"{name}: TIFF with more than {MAX_TIFF_VALUES:,} values in one tag")
        layout = read_layout(data)
        if reason := why_misread(layout):
            raise AssetError(ErrorKind.UNSUPPORTED, f"{name}: TIFF of {layout} is not decoded: {reason}")
    if kind in ("HEIC", "AVIF"):
        _refuse_parts(data, name, kind, max_pixels)


def _refuse_parts(data: bytes, name: str, kind: str, max_pixels: int) -> None:
    try:
        pixels = count_pixels(data)
    except BoxError as error:
        what = f"{kind} of {len(data):,} bytes, cut off" if is_cut(data) else f"{kind} whose boxes make no sense"
        error_kind = ErrorKind.TRUNCATED if is_cut(data) else ErrorKind.NOT_IMAGE
        raise AssetError(error_kind, f"{name}: {what} ({error})") from error
    if pixels > MAX_PARTS * max_pixels:
        message = f"{name}: {kind} put together from {pixels / 1e6:,.0f} megapixels"
        raise AssetError(ErrorKind.TOO_LARGE, f"{message}; at most {MAX_PARTS * max_pixels / 1e6:g} are decoded")


def _refuse_by_header(image: ImageFile, data: bytes, name: str, max_pixels: int) -> None:
    """Raise AssetError if decoding would take too much memory or time, or give something that is not the picture."""
    width, height = image.size
    if width * height > max_pixels:
        message = f"{name}: {_size(image)} pixels; at most {max_pixels / 1e6:g} megapixels are decoded"
        raise AssetError(ErrorKind.TOO_LARGE, message)
    if isinstance(image, TiffImageFile):
        _refuse_tiff(image, name, max_pixels)
    if isinstance(image, JpegImageFile) and width * height * (scans := count_scans(data)) > MAX_SCAN_PIXELS:
        message = f"{name}: JPEG of {_size(image)} in {scans:,} scans would take minutes to decode"
        raise AssetError(ErrorKind.DECODE_TIMEOUT, f"{message}; save it as a baseline JPEG")
    if image.mode in ("I", "F"):
        message = f"{name}: {image.format} of 32-bit or signed numbers, which have no white; save it with 8 or 16 bits"
        raise AssetError(ErrorKind.UNSUPPORTED, message)


def _refuse_tiff(image: TiffImageFile, name: str, max_pixels: int) -> None:
    tags = image.tag_v2
    tile_pixels = _whole(tags.get(322)) * _whole(tags.get(323))  # TileWidth, TileLength: a decoder's buffer
    if tile_pixels > max_pixels:
        raise AssetError(ErrorKind.TOO_LARGE, f"{name}: TIFF with tiles of {tile_pixels:,} pixels")
    if _whole(tags.get(254)) & 1 or 50706 in tags:  # NewSubfileType: reduced; DNGVersion
        message = f"{name}: camera raw or a TIFF that begins with a preview; export it as JPEG or PNG"
        raise AssetError(ErrorKind.UNSUPPORTED, message)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _size(image: ImageFile) -> str:
    return f"{image.size[0]} x {image.size[1]}"
