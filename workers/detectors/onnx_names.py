"""The class names of an ONNX detector, from its metadata or from a file beside it.

A small protobuf reader of our own reads the metadata: `submit` needs neither onnx nor the weights in memory.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

from workers.class_names import ClassNamesError, decode_text, in_order, names_of_lines, names_of_literal
from workers.detectors.kinds import DetectorError


def classes_file(path: Path) -> Path:
    """Where people write an ONNX file's class names, one a line; `coco` alone stands for COCO's eighty."""
    return path.with_suffix(".classes.txt")


def onnx_classes(path: Path) -> tuple[str, ...]:
    """The class names of an ONNX detector: of its classes file, else of its metadata entry `names` or `classes`.

    Such a graph gives class numbers and says nowhere how many there are. Raises DetectorError where no names are told.
    """
    sidecar = classes_file(path)
    if sidecar.is_file():
        return _read_sidecar(path, sidecar)
    metadata = _onnx_metadata(path)
    told = metadata.get("names") or metadata.get("classes")
    if told is None:
        raise DetectorError(
            f"detector {path}: names no classes; write them, one a line in the order of their numbers, into {sidecar} "
            "(the single line `coco` stands for COCO's eighty)"
        )
    return _parse_names(path, told)


def _read_sidecar(path: Path, sidecar: Path) -> tuple[str, ...]:
    try:
        names = in_order(names_of_lines(decode_text(sidecar.read_bytes())))
    except (ClassNamesError, UnicodeDecodeError) as error:
        raise DetectorError(f"detector {path}: {sidecar}: {error}") from error
    if not names:
        raise DetectorError(f"detector {path}: {sidecar} is empty, expected class names, one a line")
    return COCO_CLASSES if names == ("coco",) else names


def _parse_names(path: Path, told: str) -> tuple[str, ...]:
    """Names as exporters write them: a list, or number -> name, in Python's or JSON's quotes."""
    try:
        names = in_order(names_of_literal(told))
        if not names:
            raise ClassNamesError(f"{told[:80]!r}, expected a list of names, or number: name")
    except ClassNamesError as error:
        raise DetectorError(
            f"detector {path}: its metadata names classes: {error}; "
            f"or write them, one a line, into {classes_file(path)}"
        ) from error
    return names


_METADATA_FIELD = 14  # ModelProto.metadata_props of onnx.proto
_MOST_METADATA_BYTES = 1 << 20


def _onnx_metadata(path: Path) -> dict[str, str]:
    """The metadata of an ONNX file; its weights are passed over, and no library is needed.

    Source of the format: protobuf's encoding guide, and onnx.proto.
    """
    size = path.stat().st_size
    found: dict[str, str] = {}
    with path.open("rb") as file:
        while file.tell() < size:
            number, length = _read_tag(path, file)
            if length > size - file.tell() or (number == _METADATA_FIELD and length > _MOST_METADATA_BYTES):
                raise _not_onnx(path)
            if number == _METADATA_FIELD:
                entry = _read_entry(path, file.read(length))
                found[entry.get(1, "")] = entry.get(2, "")
            else:
                file.seek(length, io.SEEK_CUR)
    return found


def _read_entry(path: Path, content: bytes) -> dict[int, str]:
    """A StringStringEntryProto: its key is field 1, its value field 2."""
    entry, texts = io.BytesIO(content), dict[int, str]()
    while entry.tell() < len(content):
        number, length = _read_tag(path, entry)
        texts[number] = entry.read(length).decode("utf-8", "replace")
    return texts


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


# fmt: off
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)
