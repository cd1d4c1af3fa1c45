"""What a file's header says before a pixel is decoded: pieces, announced bytes, scans, orientation.

The bytes are hostile. Every loop here is bounded by the file's length or by a constant.
"""

from __future__ import annotations

import re
import struct

from workers.images.boxes import is_cut
from workers.images.tiff import read_entries

MAX_TIFF_VALUES = 1_000_000
"""Most numbers in one tag, usually offsets of strips or tiles. Pillow makes a Python object of 200 bytes of each."""


# Pillow unpacks a BMP's run lengths in Python code: 0.3 to 0.5 s a megabyte (2026-11-25, 2 shared cores).
MAX_RUN_LENGTH_BYTES = 20 * 1024 * 1024
MAX_PIECES = 100_000
"""Most segments, chunks, blocks and stray bytes that a parser must step over. Pillow takes microseconds for each."""
_EXIF_BYTES_A_PIECE = 4096  # with each further EXIF segment of a JPEG, Pillow copies those before it: 0.5 ns a byte


def exif_orientation(exif: object) -> int:
    """Orientation 1..8 of an EXIF block. 1 if there is none, or if the block is broken.

    Our own reader does the same as browsers: it takes the tag in the first directory, a SHORT. Pillow would also take
    it from XMP, and no browser does. Pillow's parser also fails on broken blocks with a good orientation.
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


def webp_orientation(data: bytes) -> int:
    """The orientation 1..8 in the EXIF chunk of a WebP. 1 if there is none."""
    position = 12
    for _ in range(MAX_PIECES):
        if position + 8 > len(data):
            break
        size_bytes = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"EXIF":
            return exif_orientation(data[position + 8 : position + 8 + size_bytes])
        position += 8 + size_bytes + size_bytes % 2
    return 1


_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_SCANS_IN_ANY_CASE = 50


def count_scans(data: bytes) -> int:
    """Scans of the first picture in a JPEG. Below _SCANS_IN_ANY_CASE the count may include scans of later pictures."""
    scans, components, position = 0, 0, 2
    while found := _JPEG_MARKER.search(data, position):
        marker, body = found[1][0], found.end()
        if marker == 0xD9:  # end of image
            break
        if marker == 0xDA:  # start of scan
            scans += 1
            # In a sequential JPEG, a scan with all components is the only scan.
            if scans == 1 and bytes([components]) == data[body + 2 : body + 3]:
                return 1
            # Entropy-coded bytes hold no marker, so this upper bound is cheap. It is enough for all normal pictures.
            if scans == 1 and (at_most := data.count(b"\xff\xda", body)) < _SCANS_IN_ANY_CASE:
                return at_most + 1
        if marker in (0xC0, 0xC1, 0xC9):  # start of a sequential frame
            components = int.from_bytes(data[body + 7 : body + 8], "big")
        position = body + int.from_bytes(data[body : body + 2], "big")
    return scans


def outline(data: bytes, kind: str) -> tuple[int, int]:
    """The number of pieces in the header, and the least number of bytes; a file with fewer was cut off.

    Counts only a little past MAX_PIECES.
    """
    if kind == "PNG":
        return _outline_png(data)
    if kind == "JPEG":
        return _outline_jpeg(data)
    if kind == "GIF":
        return _outline_gif(data)
    if kind == "TIFF":
        entries = read_entries(data, MAX_PIECES + 1)
        return len(entries), max((entry.end for entry in entries), default=len(data) + 1)
    if kind in ("HEIC", "AVIF"):
        return 1, len(data) + is_cut(data)
    return 1, 8 + int.from_bytes(data[4:8], "little") if kind == "WebP" else int.from_bytes(data[10:14], "little")


def _outline_png(data: bytes) -> tuple[int, int]:
    pieces, position, chunk = 0, 8, b""
    while pieces <= MAX_PIECES and chunk != b"IEND" and (chunk := data[position + 4 : position + 8]).isalpha():
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        pieces += 1
    return pieces, position if chunk == b"IEND" else position + 8


def _outline_jpeg(data: bytes) -> tuple[int, int]:
    pieces, position, exif_bytes = 0, 2, 0
    while pieces <= MAX_PIECES and (found := _JPEG_MARKER.search(data, position)):
        body = found.end()
        pieces += body - position - 1
        position = body + int.from_bytes(data[body : body + 2], "big")
        if found[1] == b"\xe1" and data.startswith(b"Exif\0\0", body + 2):
            pieces += exif_bytes // _EXIF_BYTES_A_PIECE
            exif_bytes += position - body
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


def has_run_lengths(data: bytes) -> bool:
    """Whether a BMP is packed in run lengths (BI_RLE8, BI_RLE4). Source: Microsoft's BITMAPINFOHEADER."""
    header_bytes, compression = (int.from_bytes(data[start : start + 4], "little") for start in (14, 30))
    return header_bytes >= 40 and compression in (1, 2)
