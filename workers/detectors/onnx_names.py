"""The class names of an ONNX detector, from its metadata or from a file beside it."""

from __future__ import annotations

from pathlib import Path

from workers.class_names import ClassNamesError, decode_text, in_order, names_of_lines, names_of_literal
from workers.detectors.kinds import DetectorError
from workers.detectors.onnx_file import onnx_metadata


def classes_file(path: Path) -> Path:
    """Where people write an ONNX file's class names, one a line. The single line `coco` means COCO's eighty names."""
    return path.with_suffix(".classes.txt")


def onnx_classes(path: Path) -> tuple[str, ...]:
    """The class names of an ONNX detector: from its classes file, else from its metadata entry `names` or `classes`.

    The graph gives class numbers, but not how many classes there are. Raises DetectorError if there are no names.
    """
    sidecar = classes_file(path)
    if sidecar.is_file():
        return _read_sidecar(path, sidecar)
    metadata = onnx_metadata(path)
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
