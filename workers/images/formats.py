"""Image formats by their first bytes: those that we read, and those that we know and refuse."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from pi_heif.as_plugin import HeifImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from workers.errors import AssetError, ErrorKind

Opener = Callable[[io.BytesIO], ImageFile]

_SIGNATURES: tuple[tuple[str, re.Pattern[bytes], Opener], ...] = (
    # We open by class, not by Image.open. So Pillow's other forty parsers never see hostile bytes, and our messages
    # have Pillow's reasons. An MPO is a JPEG with more JPEGs after it. The plain class reads the first.
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.S), WebPImageFile),
    ("TIFF", re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), TiffImageFile),
    ("BMP", re.compile(rb"BM.{12}", re.S), BmpImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImageFile),
    # The first brand may name only the container (mif1, msf1). Then an AVIF has its own brand among the next ones.
    ("AVIF", re.compile(rb".{4}ftyp(?:.{4}){0,8}?avi[fs]", re.S), AvifImageFile),
    ("HEIC", re.compile(rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", re.S), HeifImageFile),
)

_UNSUPPORTED_SIGNATURES = (
    ("Canon raw", re.compile(rb".{4}ftypcrx |II\*\0.{4}CR\x02", re.S)),
    ("video", re.compile(rb".{4}ftyp(?!avi[fs]|hei[cmsx]|hev[cmsx]|mif1|msf1)|\x1aE\xdf\xa3|RIFF....AVI ", re.S)),
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

_ACCEPTED = "JPEG, PNG, WebP, TIFF, BMP, GIF, HEIC and AVIF are"


def sniff(data: bytes, name: str) -> tuple[str, Opener]:
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
