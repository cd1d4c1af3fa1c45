"""Turns an asset's bytes into upright RGB pixels: the one door to Pillow, and the one place where EXIF turns a picture.

What is decoded is decided by content, never by name, and what is refused is refused from the header, before any
pixel is. All masks, boxes and sizes of the project are in the frame that `decode` returns, which a browser shows.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from workers.errors import AssetError, ErrorKind

RgbImage = npt.NDArray[np.uint8]
"""(H, W, 3) uint8, C-contiguous, channels red, green, blue in 0..255, upright."""

MAX_PIXELS = 100_000_000
MAX_BYTES = 200 * 2**20
MAX_SCAN_PIXELS = 5_000_000_000
"""Pixels times scans of a JPEG: half a minute of decoding at worst (2 to 6 ns each, EPYC Zen5, 2026-11). Encoders write
some ten scans, and a picture of 100 MP may have fifty; a few kilobytes can hold thousands."""

MAX_TIFF_VALUES = 1_000_000
"""Numbers in one tag, mostly a strip's or tile's offset each: Pillow makes Python objects of them, 200 bytes each."""

MAX_PIECES = 100_000
"""Segments, chunks, blocks and stray bytes that a parser has to step over: Pillow takes microseconds for each."""

STRIP_PIXELS = 2**18  # converted at a time: stays in the cache; 12 MP took 70 ms by strips, 100 ms at once (2026-11)

# warnings.catch_warnings changes the whole process and is not for threads, so Pillow is silenced once, here. What it
# warns and logs about (broken metadata, mostly) either does not matter to pixels or comes as an error as well.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def decode(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> RgbImage:
    """Decode a picture: its first page or frame, upright, transparency over white.

    data: JPEG (MPO), PNG, WebP, TIFF, BMP or GIF; 16 bits a channel are scaled to 8 over the full range. Colour
    profiles are not applied. name: for messages only.
    Raises AssetError: not_image, unsupported, too_large (in bytes or pixels), truncated (cut or damaged),
    decode_timeout (a JPEG of so many scans that decoding it would take minutes).
    At the limit of 100 MP: 5 s, and 0.7 GB besides `data` (JPEG, PNG, TIFF, BMP, GIF), 1.2 GB (progressive JPEG) or
    1.7 GB (WebP). Measured 2026-11, EPYC Zen5: up to 45 ns, 7, 12 and 17 bytes a pixel. Threads may decode at once.
    """
    if len(data) > MAX_BYTES:
        raise AssetError(ErrorKind.TOO_LARGE, f"{name}: {len(data):,} bytes; at most {MAX_BYTES:,} are decoded")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit, which some formats check first, only ever grows
    kind, opener = _sniff(data, name)
    image = _open(data, name, kind, opener)
    _refuse_by_header(image, data, name, max_pixels)
    try:
        image.load()
        return _upright_rgb(image)
    except MemoryError as error:
        raise AssetError(ErrorKind.TOO_LARGE, f"{name}: {kind} of {_size(image)}: not enough memory") from error
    except _PILLOW_RAISES as error:
        if _UNSUPPORTED_WORDS.search(str(error)):
            raise AssetError(ErrorKind.UNSUPPORTED, f"{name}: {kind} of {_size(image)}: {error}") from error
        raise AssetError(
            ErrorKind.TRUNCATED,
            f"{name}: {kind} of {_size(image)}, {len(data):,} bytes: cut off or damaged ({error}); upload it again",
        ) from error


def thumbnail_jpeg(image: RgbImage, longest_side: int, quality: int = 80) -> bytes:
    """A JPEG of the picture, its longer side at most `longest_side` pixels; smaller ones keep their size.

    image: (H, W, 3) uint8 RGB. quality: 1..95, as libjpeg has it.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


# What Pillow raises on hostile bytes. Not Exception: a mistake of ours is not a verdict on the asset.
_PILLOW_RAISES = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AttributeError),
    *(NotImplementedError, RuntimeError, AssertionError, struct.error, zlib.error),
    *(Image.DecompressionBombError, ImageCms.PyCMSError),
)
_UNSUPPORTED_WORDS = re.compile(
    r"unsupported|not supported|not available|unknown|not implemented|unrecognized mode", re.I
)

_Opener = Callable[[io.BytesIO], ImageFile]
_SIGNATURES: tuple[tuple[str, re.Pattern[bytes], _Opener], ...] = (
    # Opening by class, not by Image.open, keeps Pillow's other forty parsers away from hostile bytes and its reasons
    # in our messages. An MPO is a JPEG with more JPEGs behind it: the plain class reads the first.
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.S), WebPImageFile),
    ("TIFF", re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), TiffImageFile),
    ("BMP", re.compile(rb"BM.{12}", re.S), BmpImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImageFile),
)
_UNSUPPORTED_SIGNATURES = (
    ("AVIF", re.compile(rb".{4}ftyp(?:avif|avis)", re.S)),
    ("HEIC", re.compile(rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", re.S)),
    ("Canon raw", re.compile(rb".{4}ftypcrx |II\*\0.{4}CR\x02", re.S)),
    ("video", re.compile(rb".{4}ftyp|\x1aE\xdf\xa3|RIFF....AVI ", re.S)),
    ("SVG", re.compile(rb"(?:\xef\xbb\xbf)?\s{0,99}(?:<(?:\?xml|!--|!DOCTYPE svg).{0,4000}?)?<svg[\s>]", re.S)),
    ("Photoshop PSD", re.compile(rb"8BPS")),
    ("JPEG 2000", re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51")),
    ("JPEG XL", re.compile(rb"\0\0\0\x0cJXL |\xff\x0a")),
    ("PDF", re.compile(rb"%PDF-")),
    ("PostScript", re.compile(rb"%!PS|\xc5\xd0\xd3\xc6")),
    ("icon", re.compile(rb"\0\0[\1\2]\0[^\0]\0")),
    ("DICOM", re.compile(rb".{128}DICM", re.S)),
    ("OpenEXR", re.compile(rb"\x76\x2f\x31\x01")),
    ("Radiance HDR", re.compile(rb"#\?RADIANCE|#\?RGBE")),
    ("DDS", re.compile(rb"DDS ")),
    ("FITS", re.compile(rb"SIMPLE  =")),
    ("Netpbm", re.compile(rb"P[1-7fF][\s#]")),
    ("QOI", re.compile(rb"qoif")),
)
_ACCEPTED = "JPEG, PNG, WebP, TIFF, BMP and GIF are"


def _sniff(data: bytes, name: str) -> tuple[str, _Opener]:
    """The format by its first bytes; raises AssetError naming what they are instead."""
    if not data:
        raise AssetError(ErrorKind.NOT_IMAGE, f"{name}: empty, 0 bytes; upload it again")
    for kind, pattern in _UNSUPPORTED_SIGNATURES:
        if pattern.match(data):
            raise AssetError(ErrorKind.UNSUPPORTED, f"{name}: {kind} is not decoded; {_ACCEPTED}: convert it")
    for kind, pattern, opener in _SIGNATURES:
        if pattern.match(data):
            return kind, opener
    hint = ""
    if re.match(rb"(?:\xef\xbb\xbf)?\s*<(?:\?xml|!doctype|html|error)", data, re.I):
        hint = "; it is XML or HTML, perhaps an error page that was saved under an image's name"
    raise AssetError(ErrorKind.NOT_IMAGE, f"{name}: {len(data):,} bytes, not an image (starts {data[:32]!r}){hint}")


def _open(data: bytes, name: str, kind: str, opener: _Opener) -> ImageFile:
    """Read the header alone, once it is known to be of a sane length."""
    pieces, announced_bytes = _outline(data, kind)
    if pieces > MAX_PIECES:
        message = f"{name}: {kind} in more than {MAX_PIECES:,} pieces, which would take minutes to decode; save it anew"
        raise AssetError(ErrorKind.DECODE_TIMEOUT, message)
    if kind == "TIFF" and any(count > MAX_TIFF_VALUES and end <= len(data) for _, count, end in _tiff_entries(data)):
        raise AssetError(ErrorKind.TOO_LARGE, f"{name}: TIFF with more than {MAX_TIFF_VALUES:,} values in one tag")
    try:
        return opener(io.BytesIO(data))
    except (Image.DecompressionBombError, MemoryError) as error:
        raise AssetError(ErrorKind.TOO_LARGE, f"{name}: {kind}: {error}") from error
    except _PILLOW_RAISES as error:
        reason = f"({error}; starts {data[:32]!r})"
        if "Decompressed data too large" in str(error):
            message = f"{name}: {kind} with a text or profile chunk that inflates without end"
            raise AssetError(ErrorKind.TOO_LARGE, message) from error
        if announced_bytes > len(data):
            raise AssetError(ErrorKind.TRUNCATED, f"{name}: {kind} of {len(data):,} bytes, cut off {reason}") from error
        if _UNSUPPORTED_WORDS.search(str(error)):
            raise AssetError(ErrorKind.UNSUPPORTED, f"{name}: a kind of {kind} that is not decoded {reason}") from error
        message = f"{name}: starts as {kind}, but its header makes no sense {reason}"
        raise AssetError(ErrorKind.NOT_IMAGE, message) from error


def _refuse_by_header(image: ImageFile, data: bytes, name: str, max_pixels: int) -> None:
    """Raise AssetError if decoding would take too much memory or time, or give something that is not the picture."""
    width, height = image.size
    if width * height > max_pixels:
        message = f"{name}: {_size(image)} pixels; at most {max_pixels / 1e6:g} megapixels are decoded"
        raise AssetError(ErrorKind.TOO_LARGE, message)
    if isinstance(image, TiffImageFile):
        _refuse_tiff(image, name, max_pixels)
    if isinstance(image, JpegImageFile) and width * height * (scans := _count_scans(data)) > MAX_SCAN_PIXELS:
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


def _upright_rgb(image: ImageFile) -> RgbImage:
    """Convert a loaded picture strip by strip into one array, writing each strip where it belongs upright."""
    width, height = image.size
    # TIFF's orientation is applied by Pillow as it loads; all others keep it in their EXIF block.
    orientation = 1 if isinstance(image, TiffImageFile) else _exif_orientation(image.info.get("exif"))
    upright = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
    stored = _as_stored(upright, orientation)
    to_rgb = _converter(image)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        stored[top:bottom] = to_rgb(image.crop((0, top, width, bottom)))
    return upright


def _as_stored(upright: RgbImage, orientation: int) -> RgbImage:
    """A view of the upright array in the frame of the file. orientation: EXIF's 1..8 (Exif 3.0, tag 274)."""
    view = upright.transpose(1, 0, 2) if orientation >= 5 else upright
    if orientation in (3, 4, 6, 7):
        view = view[::-1]
    if orientation in (2, 3, 7, 8):
        view = view[:, ::-1]
    return view


def _converter(image: ImageFile) -> Callable[[Image.Image], npt.NDArray[np.uint8]]:
    """How a strip of this picture becomes (rows, W, 3) uint8 RGB."""
    if image.mode.startswith("I;16"):
        white_is_zero = isinstance(image, TiffImageFile) and image.tag_v2.get(262) == 0
        return lambda strip: _from_16_bit(strip, white_is_zero)
    if image.mode == "LAB":
        transform = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), inMode="LAB", outMode="RGB"
        )
        return lambda strip: np.asarray(ImageCms.applyTransform(strip, transform))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return _over_white
    return lambda strip: np.asarray(strip.convert("RGB"))


def _from_16_bit(strip: Image.Image, white_is_zero: bool) -> npt.NDArray[np.uint8]:
    """Scale grey of 0..65535 to 0..255, rounding; Pillow's own conversion clips everything above 255 to white."""
    samples = np.asarray(strip).astype(np.uint32)
    grey = ((samples + 128) // 257).astype(np.uint8)
    if white_is_zero:
        grey = 255 - grey
    transparent = strip.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return np.repeat(grey[..., None], 3, axis=2)


def _over_white(strip: Image.Image) -> npt.NDArray[np.uint8]:
    picture = strip.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def _exif_orientation(exif: object) -> int:
    """Orientation 1..8 of an EXIF block; 1 where there is none, or where the block is broken.

    Read by hand, as browsers do: the tag in the first directory, a SHORT. Pillow would also take it from XMP, which
    no browser does, and its parser stumbles over broken blocks whose orientation is fine.
    """
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for offset in range(start + 2, min(start + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, field_type, count, value = struct.unpack_from(order + "HHIH", tiff, offset)
        if tag == 0x0112:
            return value if field_type == 3 and count == 1 and 1 <= value <= 8 else 1
    return 1


_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_SCANS_IN_ANY_CASE = 50


def _count_scans(data: bytes) -> int:
    """Scans of the first picture in a JPEG. Up to _SCANS_IN_ANY_CASE it may count some of later pictures as well."""
    scans, components, position = 0, 0, 2
    while found := _JPEG_MARKER.search(data, position):
        marker, body = found[1][0], found.end()
        if marker == 0xD9:  # end of image
            break
        if marker == 0xDA:  # start of scan
            scans += 1
            # A scan with all components is the only one of a sequential JPEG.
            if scans == 1 and bytes([components]) == data[body + 2 : body + 3]:
                return 1
            # Entropy-coded bytes hold no marker, so this bound is cheap to have, and it settles all honest pictures.
            if scans == 1 and (at_most := data.count(b"\xff\xda", body)) < _SCANS_IN_ANY_CASE:
                return at_most + 1
        if marker in (0xC0, 0xC1, 0xC9):  # start of a sequential frame
            components = int.from_bytes(data[body + 7 : body + 8], "big")
        position = body + int.from_bytes(data[body : body + 2], "big")
    return scans


def _outline(data: bytes, kind: str) -> tuple[int, int]:
    """Into how many pieces the header is cut, and how many bytes there must be at least, or the file was cut off.

    Counts a little past MAX_PIECES and no further.
    """
    if kind == "PNG":
        return _outline_png(data)
    if kind == "JPEG":
        return _outline_jpeg(data)
    if kind == "GIF":
        return _outline_gif(data)
    if kind == "TIFF":
        entries = _tiff_entries(data)
        return len(entries), max((end for _, _, end in entries), default=len(data) + 1)
    return 1, 8 + int.from_bytes(data[4:8], "little") if kind == "WebP" else int.from_bytes(data[10:14], "little")


def _outline_png(data: bytes) -> tuple[int, int]:
    pieces, position, chunk = 0, 8, b""
    while pieces <= MAX_PIECES and chunk != b"IEND" and (chunk := data[position + 4 : position + 8]).isalpha():
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        pieces += 1
    return pieces, position if chunk == b"IEND" else position + 8


def _outline_jpeg(data: bytes) -> tuple[int, int]:
    pieces, position = 0, 2
    while pieces <= MAX_PIECES and (found := _JPEG_MARKER.search(data, position)):
        pieces += found.end() - position - 1
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        if found[1] == b"\xda":  # pixels follow
            break
    return pieces, position + 2


_GIF_BLOCK = re.compile(rb"[!,;]")


def _outline_gif(data: bytes) -> tuple[int, int]:
    palette_bytes = 3 << (1 + (data[10] & 7)) if len(data) > 10 and data[10] & 0x80 else 0
    pieces, position = 0, 13 + palette_bytes
    while pieces <= MAX_PIECES and (found := _GIF_BLOCK.search(data, position)):
        pieces += found.end() - position
        position = found.end()
        if found[0] != b"!":  # an image, or the end
            break
        position += 1
        while pieces <= MAX_PIECES and (size_bytes := int.from_bytes(data[position : position + 1], "big")):
            position += 1 + size_bytes
            pieces += 1
        position += 1
    return pieces, position + 9


_TIFF_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}


def _tiff_entries(data: bytes) -> list[tuple[int, int, int]]:
    """Tag, number of values (0 for opaque bytes and texts) and end in the file of each entry of a TIFF's first page.

    Nothing if the page's directory lies behind the end of the bytes.
    """
    order = "<" if data[:1] == b"I" else ">"
    big = b"+" in data[2:4]
    first, number, entry, inline_bytes = ("8xQ", "Q", "HHQQ", 8) if big else ("4xI", "H", "HHII", 4)
    try:
        (start,) = struct.unpack_from(order + first, data)
        (entries,) = struct.unpack_from(order + number, data, start)
        start += struct.calcsize(order + number)
        entries = min(entries, MAX_PIECES + 1)
        directory = data[start : start + entries * struct.calcsize(order + entry)]
        found = []
        for tag, field_type, count, offset in struct.iter_unpack(order + entry, directory):
            value_bytes = count * _TIFF_TYPE_BYTES.get(field_type, 0)
            end = offset + value_bytes if value_bytes > inline_bytes else start + len(directory)
            found.append((tag, 0 if field_type in (1, 2, 6, 7) else count, end))
        return found
    except struct.error:
        return []


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _size(image: ImageFile) -> str:
    return f"{image.size[0]} x {image.size[1]}"
