"""Writes HEIC files box by box (ISO 14496-12, ISO 23008-12), around pictures that pillow-heif encodes."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import pillow_heif
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture, or what is about it. properties: whole boxes. hidden: a part of another."""

    kind: bytes
    content: bytes
    properties: Sequence[bytes] = ()
    hidden: bool = False


@dataclass(frozen=True, kw_only=True)
class Heif:
    """references: (kind, from, to) of items by number."""

    items: dict[int, Item]
    primary: int = 1
    references: Sequence[tuple[bytes, int, Sequence[int]]] = field(default_factory=tuple)

    def write(self) -> bytes:
        kind_of_file = box(b"ftyp", b"heic", bytes(4), b"mif1", b"heic")
        contents = dict.fromkeys(item.content for item in self.items.values())  # the same bytes are stored once
        before = len(kind_of_file) + len(self._meta(dict.fromkeys(contents, 0))) + 8
        offsets = {}
        for content in contents:
            offsets[content] = before
            before += len(content)
        return kind_of_file + self._meta(offsets) + box(b"mdat", *contents)

    def _meta(self, offsets: dict[bytes, int]) -> bytes:
        properties = list(dict.fromkeys(one for item in self.items.values() for one in item.properties))
        names, places, owned = [], b"", b""
        for number, item in self.items.items():
            names.append(full_box(b"infe", 2, int(item.hidden), struct.pack(">HH4s", number, 0, item.kind), b"\0"))
            places += struct.pack(">HHHHII", number, 0, 0, 1, offsets[item.content], len(item.content))
            owned += struct.pack(">HB", number, len(item.properties))
            owned += bytes(0x80 | (properties.index(one) + 1) for one in item.properties)
        count = struct.pack(">H", len(self.items))
        references = [box(kind, struct.pack(f">HH{len(to)}H", by, len(to), *to)) for kind, by, to in self.references]
        return full_box(
            b"meta",
            0,
            0,
            full_box(b"hdlr", 0, 0, bytes(4) + b"pict" + bytes(13)),
            full_box(b"pitm", 0, 0, struct.pack(">H", self.primary)),
            full_box(b"iloc", 1, 0, struct.pack(">BB", 0x44, 0), count, places),
            full_box(b"iinf", 0, 0, count, *names),
            *([full_box(b"iref", 0, 0, *references)] if references else []),
            box(
                b"iprp",
                box(b"ipco", *properties),
                full_box(b"ipma", 0, 0, struct.pack(">I", len(self.items)), owned),
            ),
        )


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def full_box(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def size_box(width: int, height: int) -> bytes:
    return full_box(b"ispe", 0, 0, struct.pack(">II", width, height))


def hevc_item(image: Image.Image, *, more: Sequence[bytes] = (), hidden: bool = False, quality: int = 90) -> Item:
    """The picture encoded, with its decoder's configuration and its size as properties."""
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=quality, chroma=444)
    data = file.getvalue()
    start = data.index(b"hvcC") - 4
    configuration = data[start : start + int.from_bytes(data[start : start + 4], "big")]
    content = data[data.index(b"mdat") + 4 :]
    return Item(kind=b"hvc1", content=content, properties=[configuration, size_box(*image.size), *more], hidden=hidden)


def grid(tile: Item, *, rows: int, columns: int, size_wh: tuple[int, int], more: Sequence[bytes] = ()) -> Heif:
    """A picture of rows x columns tiles that share one tile's bytes."""
    content = bytes([0, 1, rows - 1, columns - 1]) + struct.pack(">II", *size_wh)
    items = {1: Item(kind=b"grid", content=content, properties=[size_box(*size_wh), *more])}
    items |= {2 + number: tile for number in range(rows * columns)}
    return Heif(items=items, references=[(b"dimg", 1, range(2, 2 + rows * columns))])
