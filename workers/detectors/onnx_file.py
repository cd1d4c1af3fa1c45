"""What `submit` must know of an ONNX file: its metadata, and the files that hold weights outside of it.

A small protobuf reader of our own, so that `submit` needs neither onnx nor the weights in memory: it seeks past them.
Source of the format: protobuf's encoding guide, and onnx.proto. The bytes are hostile: every length is checked against
the bytes that are there.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from workers.detectors.kinds import DetectorError

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_ATTRIBUTE, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 5, 5, 6
_TENSOR_EXTERNAL_DATA = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_MOST_ENTRY_BYTES = 1 << 20
_MOST_DEPTH = 8  # of graphs in graphs


def onnx_metadata(path: Path) -> dict[str, str]:
    """The texts that the file's maker put beside the graph, by name. Raises DetectorError where it is no ONNX file."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        for number, end in _fields(path, file, path.stat().st_size):
            if number == _MODEL_METADATA:
                key, value = _read_entry(path, file, end)
                found[key] = value
    return found


def external_files(path: Path) -> list[Path]:
    """The files beside this one that hold some of its weights, sorted. Raises DetectorError where one is not there.

    A file elsewhere is refused, as onnxruntime does: its name comes from the bytes of the model.
    """
    with path.open("rb") as file:
        names = sorted(set(_locations(path, file, path.stat().st_size)))
    for name in names:
        if Path(name).name != name or not (path.parent / name).is_file():
            raise DetectorError(
                f"detector {path}: some of its weights are in {name!r:.80}, expected a file of that name beside it"
            )
    return [path.parent / name for name in names]


def _locations(path: Path, file: IO[bytes], end: int) -> Iterator[str]:
    for number, graph_end in _fields(path, file, end):
        if number == _MODEL_GRAPH:
            yield from _locations_of_graph(path, file, graph_end, _MOST_DEPTH)


def _locations_of_graph(path: Path, file: IO[bytes], end: int, depth: int) -> Iterator[str]:
    if depth == 0:
        raise _not_onnx(path)
    for number, part_end in _fields(path, file, end):
        if number == _GRAPH_INITIALIZER:
            yield from _locations_of_tensor(path, file, part_end)
        elif number == _GRAPH_NODE:
            for in_node, attribute_end in _fields(path, file, part_end):
                if in_node == _NODE_ATTRIBUTE:
                    yield from _locations_of_attribute(path, file, attribute_end, depth)


def _locations_of_attribute(path: Path, file: IO[bytes], end: int, depth: int) -> Iterator[str]:
    for number, value_end in _fields(path, file, end):
        if number == _ATTRIBUTE_TENSOR:
            yield from _locations_of_tensor(path, file, value_end)
        elif number == _ATTRIBUTE_GRAPH:
            yield from _locations_of_graph(path, file, value_end, depth - 1)


def _locations_of_tensor(path: Path, file: IO[bytes], end: int) -> Iterator[str]:
    for number, entry_end in _fields(path, file, end):
        if number == _TENSOR_EXTERNAL_DATA:
            key, value = _read_entry(path, file, entry_end)
            if key == "location":
                yield value


def _read_entry(path: Path, file: IO[bytes], end: int) -> tuple[str, str]:
    """A StringStringEntryProto: (key, value)."""
    if end - file.tell() > _MOST_ENTRY_BYTES:
        raise _not_onnx(path)
    texts = {number: file.read(part_end - file.tell()) for number, part_end in _fields(path, file, end)}
    key, value = (texts.get(number, b"").decode("utf-8", "replace") for number in (_ENTRY_KEY, _ENTRY_VALUE))
    return key, value


def _fields(path: Path, file: IO[bytes], end: int) -> Iterator[tuple[int, int]]:
    """The fields of a message that ends at `end`: (number, where the field ends), with the file at its first byte.

    The caller may read any part of a field; the next one is found all the same.
    """
    while file.tell() < end:
        number, length = _read_tag(path, file)
        field_end = file.tell() + length
        if field_end > end:
            raise _not_onnx(path)
        yield number, field_end
        file.seek(field_end, io.SEEK_SET)


def _read_tag(path: Path, file: IO[bytes]) -> tuple[int, int]:
    """A field's number, and how many bytes of it follow."""
    tag = _read_varint(path, file)
    match tag & 7:
        case 0:
            _read_varint(path, file)
            return tag >> 3, 0
        case 1:
            return tag >> 3, 8
        case 2:
            return tag >> 3, _read_varint(path, file)
        case 5:
            return tag >> 3, 4
    raise _not_onnx(path)


def _read_varint(path: Path, file: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise _not_onnx(path)


def _not_onnx(path: Path) -> DetectorError:
    return DetectorError(f"detector {path}: not an ONNX file, or cut short")
