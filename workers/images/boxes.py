"""The boxes of a HEIC or AVIF file (ISO 14496-12, ISO 23008-12): how much decoding it would cost, before it is decoded.

Such a file is a graph. A grid is made of other pictures, which may be grids again, and transparency is a picture of its
own. A few bytes name a picture, so a small file can ask for hours of work.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping

MAX_BOXES = 20_000  # in one box, as in libheif
MAX_TABLE_BYTES = 2**20  # of the tables with the sizes and parts of pictures; libheif takes 1,000 pictures
MAX_DEPTH = 8  # levels of pictures in pictures; cameras use two

Range = tuple[int, int]


class BoxError(Exception):
    """Boxes that make no sense, too many boxes, or pictures that are nested too deep or in a circle."""


def is_cut(data: bytes) -> bool:
    """For a file that cannot be decoded: True if it was cut off. Its last box is cut, or it has no box of pixels."""
    try:
        boxes = list(_boxes(data, 0, len(data)))
    except (BoxError, struct.error):
        return False
    return max((end for _, _, end in boxes), default=0) > len(data) or all(kind != b"mdat" for kind, _, _ in boxes)


def count_pixels(data: bytes) -> int:
    """Pixels that are decoded to show the primary picture: its own, those of its tiles and of its transparency.

    A tile that is used twice counts twice. 0 for a file without a still picture (an image sequence).
    Raises BoxError.
    """
    try:
        top = _found(data, 0, len(data))
        if b"meta" not in top:
            return 0
        meta = _found(data, *_after_version(_only(top, b"meta")))
        start, _ = _only(meta, b"pitm")
        (primary,) = _items(data, start + 4, 1, wide=data[start] > 0)
        areas = _areas_of_items(data, _only(meta, b"iprp"))
        parts = _parts_of_items(data, _only(meta, b"iref")) if b"iref" in meta else {}
    except (struct.error, IndexError, OverflowError) as error:  # the last one for a box of 2**63 bytes or more
        raise BoxError(f"a box ends too early ({error})") from error
    return _cost(primary, areas, parts, {}, MAX_DEPTH)


def _cost(
    item: int, areas: Mapping[int, int], parts: Mapping[int, list[int]], known: dict[int, int], depth: int
) -> int:
    if depth == 0:
        raise BoxError(f"pictures within pictures, more than {MAX_DEPTH} deep")
    if item not in known:
        tiles = (_cost(part, areas, parts, known, depth - 1) for part in parts.get(item, []))
        known[item] = areas.get(item, 0) + sum(tiles)
    return known[item]


def _areas_of_items(data: bytes, properties: Range) -> dict[int, int]:
    """Width times height of each picture, from the properties with sizes and the table of each picture's properties."""
    inside = _found(data, *properties)
    areas = [0]  # properties are numbered from 1
    for kind, start, _ in _boxes(data, *_only(inside, b"ipco")):
        width, height = struct.unpack_from(">4xII", data, start) if kind == b"ispe" else (0, 0)
        areas.append(width * height)
    largest: defaultdict[int, int] = defaultdict(int)
    for start, end in _short(inside.get(b"ipma", [])):
        wide_item, wide_index = data[start] > 0, data[start + 3] & 1
        (entries,) = struct.unpack_from(">I", data, start + 4)
        position = start + 8
        for _ in range(entries):
            if position >= end:
                raise BoxError(f"{entries:,} pictures are announced, which are not there")
            (item,) = _items(data, position, 1, wide=wide_item)
            position += 4 if wide_item else 2
            indexes = struct.unpack_from(f">{data[position]}{'H' if wide_index else 'B'}", data, position + 1)
            position += 1 + len(indexes) * (2 if wide_index else 1)
            numbers = (index & (0x7FFF if wide_index else 0x7F) for index in indexes)  # the top bit says "essential"
            largest[item] = max([largest[item], *(areas[n] for n in numbers if n < len(areas))])
    return largest


def _parts_of_items(data: bytes, references: Range) -> dict[int, list[int]]:
    """The pictures that must be decoded for each picture: its tiles, its layers, its transparency."""
    parts: defaultdict[int, list[int]] = defaultdict(list)
    _short([references])
    wide = data[references[0]] > 0
    for kind, start, _ in _boxes(data, *_after_version(references)):
        (by,) = _items(data, start, 1, wide=wide)
        start += 4 if wide else 2
        (number,) = struct.unpack_from(">H", data, start)
        to = _items(data, start + 2, number, wide=wide)
        if kind == b"dimg":
            parts[by] += to
        elif kind == b"auxl":
            for picture in to:
                parts[picture].append(by)
    return parts


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start of the content and end of each box that begins between two positions."""
    for _ in range(MAX_BOXES):
        if start + 8 > end:
            return
        size_bytes, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size_bytes == 1:
            (size_bytes,) = struct.unpack_from(">Q", data, content)
            content += 8
        start = start + size_bytes if size_bytes else end  # 0: to the end of the box around it
        if start < content:
            raise BoxError(f"a box of {size_bytes} bytes")
        yield kind, content, start
    raise BoxError(f"more than {MAX_BOXES:,} boxes")


def _found(data: bytes, start: int, end: int) -> dict[bytes, list[Range]]:
    """Where the contents of the boxes lie, by kind."""
    found: defaultdict[bytes, list[Range]] = defaultdict(list)
    for kind, content, stop in _boxes(data, start, end):
        found[kind].append((content, stop))
    return found


def _only(found: Mapping[bytes, list[Range]], kind: bytes) -> Range:
    """The only box of a kind. If there are two, decoders differ in which one they use."""
    if len(found.get(kind, [])) != 1:
        raise BoxError(f"{len(found.get(kind, []))} boxes named {kind!r}, expected one")
    return found[kind][0]


def _after_version(content: Range) -> Range:
    return content[0] + 4, content[1]


def _items(data: bytes, start: int, number: int, *, wide: bool) -> tuple[int, ...]:
    """Numbers of pictures, each of 32 or 16 bits."""
    return struct.unpack_from(f">{number}{'I' if wide else 'H'}", data, start)


def _short(tables: list[Range]) -> list[Range]:
    size_bytes = sum(end - start for start, end in tables)
    if size_bytes > MAX_TABLE_BYTES:
        raise BoxError(f"tables of {size_bytes:,} bytes about its parts")
    return tables
