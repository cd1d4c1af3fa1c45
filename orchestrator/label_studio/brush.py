"""Label Studio's brush masks: run lengths of the flattened RGBA image as a stream of bits, in a list of bytes.

Format (thi.ng/umbrella rle-pack): 32 bits number of values (4 a pixel, rows first), 5 bits word size - 1, four times
4 bits width - 1 of a run length. Then tokens: 1 bit repeat, 2 bits which width, run length - 1, one 8-bit value (or,
without repeat, as many values as the run is long). The bytes written here are equal to label_studio_sdk's mask2rle.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.shapes.runs import (
    Edges,
    crop_edges,
    edges_from_counts,
    flat_edges,
    paint,
    run_lengths,
    without_empty_runs,
)
from workers.masks import BoolMask

# What the SDK and the editor write. Our reader takes other widths. Label Studio knows no other word size.
_WIDTHS = np.array([3, 4, 8, 16])
_LONGEST_RUNS = 1 << _WIDTHS
_WORD_BITS = 8
_HEADER_BITS = 32 + 5 + 4 * 4
_MAX_VALUES = (1 << 32) - 1


class BrushError(ValueError):
    """The bytes are no brush stream, or the stream has another frame."""


def encode_brush_counts(counts: str, size_hw: tuple[int, int]) -> list[int]:
    """Encode COCO compressed run lengths as Label Studio's `rle`. Raises ValueError if they are damaged."""
    return encode_brush_edges(edges_from_counts(counts, size_hw), size_hw)


def encode_brush_edges(edges: Edges, size_hw: tuple[int, int]) -> list[int]:
    """Encode column-major edges as Label Studio's `rle`."""
    return _encode_rows(_row_edges(edges, size_hw), size_hw[0] * size_hw[1])


def decode_brush(rle: object, size_hw: tuple[int, int], *, min_alpha: int = 128) -> BoolMask:
    """Decode Label Studio's `rle`, a list of whole numbers 0..255, to (H, W) bool: alpha is at least min_alpha.

    After an edit in the browser, the stream comes from an anti-aliased canvas. There alpha says how much of a pixel is
    covered. 128 keeps pixels that are at least half covered; our polygons have the same rule. 1 keeps every touched
    pixel. The editor's own stream in testdata/ls_vectors has 59,413 pixels with 1 and 57,608 with 128: a rim half a
    pixel wide. A binary mask gives the same pixels with both. Bytes after the last run are ignored.
    Memory and time depend on the frame and the stream, never on numbers in the header. Raises BrushError.
    """
    height, width = size_hw
    stream = _to_bytes(rle)
    if len(stream) * 8 < _HEADER_BITS:
        raise BrushError(f"brush stream of {len(stream)} bytes: too short for its header of 7")
    claimed = int.from_bytes(stream[:4], "big")
    if claimed != 4 * height * width:
        raise BrushError(f"brush stream of {claimed} values: a frame of {width} x {height} has {4 * height * width}")
    lengths, values = unpack_runs(stream)

    # Value 4k + 3 is the alpha of pixel k. So a run of values [a, b) holds the alphas of the pixels [a // 4, b // 4).
    stops = np.cumsum(lengths)
    spans = np.stack(((stops - lengths) // 4, stops // 4), axis=1)[values >= min_alpha]
    return paint(without_empty_runs(spans.ravel()), height * width).view(np.bool_).reshape(height, width)


def pack_runs(lengths: NDArray[np.int64], values: NDArray[np.int64]) -> list[int]:
    """Pack runs, (n,) lengths of at least 1 and (n,) values 0..255, into a stream. The header holds their sum."""
    total = int(lengths.sum())
    if total > _MAX_VALUES:
        raise ValueError(f"{total} values: the header counts 32 bits, a frame may have {_MAX_VALUES // 4} pixels")

    # A run too long for 16 bits is split into full runs and a rest.
    pieces = (lengths - 1) // _LONGEST_RUNS[3] + 1
    runs = np.full(pieces.sum(), _LONGEST_RUNS[3])
    runs[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * _LONGEST_RUNS[3]

    # Each token's bits as a number, and their count. A rest keeps the width of its run, as in the SDK.
    which = np.minimum(np.searchsorted(_LONGEST_RUNS, lengths), 3)
    flags, widths, values = (np.repeat(v, pieces) for v in ((lengths > 1) << 2 | which, _WIDTHS[which], values))
    tokens = (flags << widths | (runs - 1)) << _WORD_BITS | values
    bits = 1 + 2 + widths + _WORD_BITS

    # Write each token into the five bytes it can touch. Tokens share bytes but no bits, so adding them is right.
    stops = _HEADER_BITS + np.cumsum(bits)
    first, offset = np.divmod(stops - bits, 8)
    window = tokens << (40 - bits - offset)
    places = (first + np.arange(5)[:, None]).ravel()
    parts = (window >> np.arange(32, -1, -8)[:, None] & 255).ravel()
    header = (total << 21 | (_WORD_BITS - 1) << 16 | sum(int(w - 1) << 12 - 4 * i for i, w in enumerate(_WIDTHS))) << 3
    # The SDK pads to the next byte, even at the end of a byte.
    size = int(stops[-1]) // 8 + 1
    packed = np.bincount(places, weights=parts, minlength=size)[:size].astype(np.int64)
    packed[:7] += np.frombuffer(header.to_bytes(7, "big"), np.uint8)
    rle: list[int] = packed.tolist()
    return rle


def unpack_runs(stream: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read a stream's runs as (n,) lengths and (n,) values 0..255. Raises BrushError if it ends early or runs over.

    The header's number of values is not checked here. Compare it with the frame first.
    """
    header = int.from_bytes(stream[:8].ljust(8, b"\0"), "big") >> 11
    total, word_bits = header >> 21, (header >> 16 & 31) + 1
    widths = [(header >> 12 - 4 * i & 15) + 1 for i in range(4)]
    if word_bits != _WORD_BITS:
        raise BrushError(f"brush stream with {word_bits}-bit values: Label Studio writes {_WORD_BITS}-bit ones")

    lengths: list[int] = []
    values: list[int] = []
    padded = stream + bytes(8)
    position, done, stream_bits = _HEADER_BITS, 0, 8 * len(stream)
    while done < total:
        # The longest token without its values has 27 bits. It lies in five bytes, at any bit it starts.
        window, unread = int.from_bytes(padded[position >> 3 : (position >> 3) + 5], "big"), 40 - (position & 7)
        unread -= 3
        flags = window >> unread & 7
        width = widths[flags & 3]
        unread -= width
        length = (window >> unread & (1 << width) - 1) + 1
        position += 3 + width
        done += length
        count = 1 if flags & 4 else length
        position += count * _WORD_BITS
        if done > total or position > stream_bits:
            fault = f"runs past its {total} values" if done > total else "ends in the middle of a run"
            raise BrushError(f"brush stream of {len(stream)} bytes {fault}")
        if flags & 4:
            lengths.append(length)
            values.append(window >> unread - _WORD_BITS & 255)
        else:
            lengths.extend([1] * length)
            values.extend(_read_bytes(stream, position - 8 * length, length))
    return np.array(lengths, np.int64), np.array(values, np.int64)


def _read_bytes(stream: bytes, position: int, count: int) -> bytes:
    """`count` bytes from a position that is given in bits."""
    stop = position + 8 * count
    number = int.from_bytes(stream[position >> 3 : stop + 7 >> 3], "big") >> (-stop % 8)
    return (number & (1 << 8 * count) - 1).to_bytes(count, "big")


def _to_bytes(rle: object) -> bytes:
    if not isinstance(rle, (list, tuple, bytes)):
        raise BrushError(f"brush stream is {type(rle).__name__}, expected a list of whole numbers 0..255")
    try:
        return bytes(rle)
    except (TypeError, ValueError) as error:
        raise BrushError(f"brush stream is not a list of whole numbers 0..255: {error}") from error


def _encode_rows(edges: Edges, pixels: int) -> list[int]:
    """Encode row-major edges of a frame of `pixels`."""
    lengths = run_lengths(edges, pixels)
    values = np.zeros(lengths.size, np.int64)
    values[1::2] = 255
    there = lengths > 0
    return pack_runs(4 * lengths[there], values[there])


def _row_edges(edges: Edges, size_hw: tuple[int, int]) -> Edges:
    """Column-major edges to row-major ones."""
    if edges.size == 0:
        return edges
    crop = crop_edges(edges, size_hw)
    # A column of background on both sides keeps the rows' runs apart.
    rows = cv2.copyMakeBorder(cv2.transpose(crop.columns), 0, 0, 1, 1, cv2.BORDER_CONSTANT).astype(np.uint8, copy=False)
    row, column = np.divmod(flat_edges(rows.ravel()), rows.shape[1])
    return without_empty_runs((crop.top + row) * size_hw[1] + crop.left + column - 1)
