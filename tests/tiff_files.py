"""Writes TIFFs of every layout: tifffile lays out the file, strips and tiles are packed here."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tifffile

REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def lzw(data: bytes) -> bytes:
    """LZW as TIFF has it, with a table that is cleared before codes grow past 9 bits: it packs nothing."""
    codes = [256]
    for start in range(0, len(data), 200):
        codes += [*data[start : start + 200], 256]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def packbits(data: bytes) -> bytes:
    """Literal runs of at most 128 bytes."""
    return b"".join(bytes([len(run) - 1]) + run for run in (data[i : i + 128] for i in range(0, len(data), 128)))


PACKERS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "none": (1, bytes),
    "LZW": (5, lzw),
    "deflate": (8, zlib.compress),
    "PackBits": (32773, packbits),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How samples are stored. order: struct's "<" or ">". tile_hw: None is strips. extra: ExtraSamples."""

    order: str = "<"
    bigtiff: bool = False
    planar: bool = False
    tile_hw: tuple[int, int] | None = None
    rows_per_strip: int = 5
    packing: str = "none"
    predictor: bool = False
    fill_order: int = 1
    photometric: str = "rgb"
    extra: tuple[int, ...] = ()


def write_tiff(samples: np.ndarray, layout: Layout) -> bytes:
    """A TIFF of (H, W, S) uint8 or uint16 samples."""
    code, pack = PACKERS[layout.packing]
    pieces = (pack(piece) for piece in _pieces(samples, layout))
    if layout.fill_order == 2:
        pieces = (piece.translate(REVERSED_BITS) for piece in pieces)
    shape = samples.shape if samples.shape[2] > 1 else samples.shape[:2]
    if layout.planar:
        shape = (samples.shape[2], *samples.shape[:2])
    file = io.BytesIO()
    with tifffile.TiffWriter(file, byteorder=layout.order, bigtiff=layout.bigtiff) as writer:
        writer.write(
            pieces,
            shape=shape,
            dtype=samples.dtype.newbyteorder(layout.order),
            compression="zlib",  # any: the tag is overwritten below
            predictor=layout.predictor or None,
            photometric=layout.photometric,
            planarconfig=("separate" if layout.planar else "contig") if len(shape) == 3 else None,
            extrasamples=layout.extra or None,
            **({"tile": layout.tile_hw} if layout.tile_hw else {"rowsperstrip": layout.rows_per_strip}),
            extratags=[(_STAND_IN, 3, 1, layout.fill_order, True)],
            metadata=None,
        )
    file.seek(0)
    with tifffile.TiffFile(file) as written:
        written.pages[0].tags["Compression"].overwrite(code)
    return _with_fill_order(file.getvalue(), layout.order)


_STAND_IN, _FILL_ORDER = 269, 266  # tifffile does not write FillOrder


def _with_fill_order(data: bytes, order: str) -> bytes:
    little = order == "<"
    stand_in, field_type = (number.to_bytes(2, "little" if little else "big") for number in (_STAND_IN, 3))
    assert data.count(stand_in + field_type) == 1
    return data.replace(stand_in + field_type, _FILL_ORDER.to_bytes(2, "little" if little else "big") + field_type)


def _pieces(samples: np.ndarray, layout: Layout) -> Iterator[bytes]:
    """The strips or tiles before they are packed: plane by plane where there are planes."""
    height, width, bands = samples.shape
    planes = [samples[..., band : band + 1] for band in range(bands)] if layout.planar else [samples]
    piece_height, piece_width = layout.tile_hw or (layout.rows_per_strip, width)
    for plane in planes:
        for top in range(0, height, piece_height):
            for left in range(0, width, piece_width):
                piece = plane[top : top + piece_height, left : left + piece_width]
                if layout.tile_hw:
                    below, beside = piece_height - piece.shape[0], piece_width - piece.shape[1]
                    piece = np.pad(piece, ((0, below), (0, beside), (0, 0)))
                if layout.predictor:
                    piece = np.concatenate([piece[:, :1], np.diff(piece, axis=1)], axis=1)
                yield piece.astype(samples.dtype.newbyteorder(layout.order)).tobytes()
