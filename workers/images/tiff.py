"""How a TIFF's first page stores its samples, and which layouts are refused because Pillow misreads them.

Pillow opens hundreds of layouts and misreads some of them without an error. We know these from a property test that
writes all layouts and compares every pixel.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _FORMAT = 258, 259, 262, 277, 284, 338, 339
_LAYOUT_TAGS = (_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _FORMAT)
_PHOTOMETRICS = {0: "grey (0 is white)", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}
_COMPRESSIONS = {1: "none", 5: "LZW", 6: "old JPEG", 7: "JPEG", 8: "deflate", 32946: "deflate", 32773: "PackBits"}
_MOST_TAGS = 65_535  # a number of 16 bits, except in a BigTIFF
_MOST_VALUES = 64  # of a tag that describes the layout: one value for each sample

# Field types (TIFF 6.0, and BigTIFF's): bytes of one value, and struct's format for whole numbers.
_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_OPAQUE_TYPES = (1, 2, 6, 7)
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TiffEntry:
    """One tag. count: number of values, 0 for bytes and texts. end: where they end in the file.

    values: the whole numbers of a tag that describes the layout. Empty for other tags.
    """

    tag: int
    count: int
    end: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TiffLayout:
    """What the tags say about samples. bits, formats: one for each sample, or one for all. planar: a plane for each."""

    big_endian: bool
    bigtiff: bool
    bits: tuple[int, ...]
    formats: tuple[int, ...]
    samples: int
    photometric: int
    extra: tuple[int, ...]
    planar: bool
    compression: int

    def __str__(self) -> str:
        """The layout in words, for messages."""
        bits = "/".join(map(str, sorted(set(self.bits))))
        return ", ".join(
            [
                f"{_PHOTOMETRICS.get(self.photometric, f'PhotometricInterpretation {self.photometric}')}",
                f"{self.samples} x {bits} bits",
                *(["ExtraSamples " + " ".join(map(str, self.extra))] if self.extra else []),
                *(["one plane a sample"] if self.planar else []),
                f"compression {_COMPRESSIONS.get(self.compression, self.compression)}",
                f"{'big' if self.big_endian else 'little'}-endian{' BigTIFF' if self.bigtiff else ''}",
            ]
        )


def read_entries(data: bytes, most: int) -> list[TiffEntry]:
    """The tags of the first page, at most `most`. None if the file ends before the tags do."""
    order = "<" if data[:1] == b"I" else ">"
    first, number, entry, inline_bytes = ("8xQ", "Q", "HHQQ", 8) if _is_big(data) else ("4xI", "H", "HHII", 4)
    entry_bytes = struct.calcsize(order + entry)
    try:
        (start,) = struct.unpack_from(order + first, data)
        (entries,) = struct.unpack_from(order + number, data, start)
        start += struct.calcsize(order + number)
        directory = data[start : start + min(entries, most) * entry_bytes]
        if len(directory) < min(entries, most) * entry_bytes:
            return []
        found: list[TiffEntry] = []
        for tag, field_type, count, offset in struct.iter_unpack(order + entry, directory):
            value_bytes = count * _VALUE_BYTES.get(field_type, 0)
            inline = value_bytes <= inline_bytes
            at = start + (len(found) + 1) * entry_bytes - inline_bytes if inline else offset
            values: tuple[int, ...] = ()
            if tag in _LAYOUT_TAGS and field_type in _WHOLE_NUMBERS and count <= _MOST_VALUES:
                values = struct.unpack_from(f"{order}{count}{_WHOLE_NUMBERS[field_type]}", data, at)
            end = start + len(directory) if inline else offset + value_bytes
            found.append(TiffEntry(tag=tag, count=0 if field_type in _OPAQUE_TYPES else count, end=end, values=values))
        return found
    except (struct.error, OverflowError):  # the latter for a BigTIFF's offset of 2**63 or more
        return []


def read_layout(data: bytes) -> TiffLayout:
    """The layout that the tags of the first page describe, with TIFF's defaults for missing tags."""
    values = {entry.tag: entry.values for entry in read_entries(data, _MOST_TAGS) if entry.values}
    samples = values.get(_SAMPLES, (1,))[0]
    return TiffLayout(
        big_endian=data[:1] == b"M",
        bigtiff=_is_big(data),
        bits=values.get(_BITS, (1,)),
        formats=values.get(_FORMAT, (1,)),
        samples=samples,
        photometric=values.get(_PHOTOMETRIC, (0,))[0],
        extra=values.get(_EXTRA, ()),
        planar=values.get(_PLANAR, (1,))[0] == 2 and samples > 1,
        compression=values.get(_COMPRESSION, (1,))[0],
    )


def why_misread(layout: TiffLayout) -> str | None:
    """Why Pillow would give wrong pixels for this layout. None if they are right, or if Pillow refuses the layout."""
    if layout.bigtiff and layout.big_endian:
        return "a BigTIFF has to be little-endian"
    if set(layout.formats) != {1}:
        return "signed and floating-point numbers have no white; save it with 8 or 16 bits"
    if layout.compression == 6 or (layout.photometric == 6 and (layout.compression != 7 or layout.planar)):
        return "YCbCr has to be compressed as JPEG of the newer kind"  # libtiff does not see that such a file is cut
    transparent = any(kind in layout.extra for kind in (1, 2))
    if layout.planar and (layout.photometric == 8 or (transparent and (layout.photometric, layout.samples) != (2, 4))):
        return "of planes, only grey, RGB, RGB with transparency and CMYK are decoded"
    return None


def _is_big(data: bytes) -> bool:
    return b"+" in data[2:4]
