"""PNG files of label numbers with a palette."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

# zlib's level 1. Masks are long runs: higher levels save little and take several times as long.
_LEVEL = 1


def encode_png(pixels: NDArray[Any], palette: NDArray[np.uint8] | None = None) -> bytes:
    """Encode (H, W) pixels: bool as one bit, uint8 or uint16 as grey, uint8 with a (256, 3) RGB palette as colours.

    Source: PNG (third edition), https://www.w3.org/TR/png-3/.
    """
    height, width = pixels.shape
    if pixels.dtype == np.bool_:
        depth, rows = 1, np.packbits(pixels, axis=1)
    else:
        depth, rows = 8 * pixels.itemsize, pixels.astype(f">u{pixels.itemsize}", copy=False)
    # Each row begins with its filter; 0 means none. Filters only help for photographs.
    filtered = np.zeros((height, 1 + rows.shape[1] * rows.itemsize), np.uint8)
    filtered[:, 1:] = np.ascontiguousarray(rows).view(np.uint8)
    colour_type = 0 if palette is None else 3
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))]
    if palette is not None:
        chunks.append((b"PLTE", palette.tobytes()))
    chunks += [(b"IDAT", zlib.compress(filtered.data, _LEVEL)), (b"IEND", b"")]
    framed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _voc_palette() -> NDArray[np.uint8]:
    """PASCAL VOC's 256 colours. Bits 0, 3, 6 of the value are red's highest bits, 1, 4, 7 green's, 2, 5 blue's.

    Source: VOCdevkit, VOClabelcolormap.m.
    """
    values = np.arange(256, dtype=np.uint8)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        palette[:, bit % 3] |= (((values >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    return palette


VOC_PALETTE = _voc_palette()
