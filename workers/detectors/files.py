"""A detector's files: found by path or name, told apart, identified by content, and asked for its class names.

Torch-free, and without the libraries that run detectors: the command line looks here before any worker sees a job.
"""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO

from workers.models import ModelError, require_libraries, weights_dir
from workers.models.folders import checkpoint_files, has_weights, identity

_NAMED = 12  # class names in a message


class DetectorError(ModelError):
    """A detector cannot be used as asked. The message says which, what was found and what to do."""


class DetectorKind(StrEnum):
    TRANSFORMERS = "transformers"  # an object-detection checkpoint with classes of its own
    OPEN_VOCABULARY = "open-vocabulary"  # a checkpoint that boxes what phrases say
    ONNX = "onnx"  # a graph with the outputs of mmdeploy's RTMDet


# What config.json calls the checkpoints that AutoModelForZeroShotObjectDetection loads.
_OPEN_VOCABULARY = frozenset({"grounding-dino", "mm-grounding-dino", "owlvit", "owlv2"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorFiles:
    """What is known of a detector without loading it.

    name: as a job remembers it: an absolute path, a name in the weights folder, or a hub name. identity: "sha256:" of
    its files, or "commit:" of the hub. classes: its names in its order; empty where its files do not say, and where
    it takes phrases.
    """

    name: str
    kind: DetectorKind
    identity: str
    classes: tuple[str, ...]


def examine(name: str) -> DetectorFiles:
    """Find a detector by a path, a name in the weights folder or a hub name, and say what it is without loading it.

    Local files are read whole, for their identity. Raises DetectorError naming what was found and what to do.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _examine_local(str(path.absolute()), path)
    kept = weights_dir() / name
    if kept.exists():
        return _examine_local(name, kept)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".onnx"):
        raise DetectorError(f"detector {name}: no such file or folder here, nor in {weights_dir()}")
    return _examine_on_hub(name)


def require_classes(files: DetectorFiles, wanted: Collection[str]) -> None:
    """Raises DetectorError for a class that the detector does not know, where its files name its classes."""
    unknown = [name for name in wanted if name not in files.classes] if files.classes else []
    if unknown:
        raise DetectorError(f"detector {files.name} has no class {unknown[0]!r}; it knows {_listed(files.classes)}")


def require_library(kind: DetectorKind) -> None:
    """Raises MissingLibraryError where the library that runs such detectors is not installed."""
    require_libraries(f"a detector ({kind})", ("onnxruntime" if kind is DetectorKind.ONNX else "transformers",))


def require_same_files(name: str, asked: str) -> Path | None:
    """Where the files of a job's detector are on this machine; None for the hub's, which its commit identifies.

    Raises DetectorError where they are absent, or not those that the job was given.
    """
    if asked.startswith("commit:"):
        return None
    path = weights_dir() / name  # an absolute name stays as it is
    if not path.exists():
        raise DetectorError(f"detector {name}: nothing at {path} on this machine; put the job's detector there")
    found = _examine_local(name, path)
    if found.identity != asked:
        raise DetectorError(
            f"detector {name}: {path} is {found.identity}, the job was given {asked}; put the same files there, or "
            "submit again"
        )
    return path


def _examine_local(name: str, path: Path) -> DetectorFiles:
    try:
        if path.is_dir():
            return _examine_folder(name, path)
        if path.suffix == ".onnx":
            return _examine_onnx(name, path)
    except OSError as error:
        raise DetectorError(f"detector {name}: cannot be read ({error})") from error
    raise DetectorError(f"detector {name}: expected a checkpoint's folder with config.json, or an .onnx file")


def _examine_folder(name: str, folder: Path) -> DetectorFiles:
    if not (folder / "config.json").is_file():
        raise DetectorError(f"detector {name}: no config.json in the folder, expected a transformers checkpoint")
    if not has_weights(folder):
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:_NAMED])
        raise DetectorError(
            f"detector {name}: no .safetensors file among {found}; pickled weights could run code and are not loaded: "
            "bring the checkpoint as safetensors, as transformers' save_pretrained writes it"
        )
    kind, classes = _read_config(name, (folder / "config.json").read_bytes())
    return DetectorFiles(name=name, kind=kind, identity=_named(checkpoint_files(folder)), classes=classes)


def _examine_on_hub(name: str) -> DetectorFiles:
    absent = f"detector {name}: no such file or folder here, nor in {weights_dir()}"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise DetectorError(f"{absent}; to ask the hub for it, pip install 'maskfleet[models]'") from error
    try:
        # Answered from the local cache when the hub is out of reach: its folder is named by the commit either way.
        config = Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        raise DetectorError(f"{absent}, and the hub did not give it: {error}") from error
    kind, classes = _read_config(name, config.read_bytes())
    return DetectorFiles(name=name, kind=kind, identity=f"commit:{config.parent.name}", classes=classes)


def _read_config(name: str, content: bytes) -> tuple[DetectorKind, tuple[str, ...]]:
    """What kind of checkpoint a config.json describes, and its class names in the order of their numbers."""
    try:
        config = json.loads(content)
        architecture = str((config.get("architectures") or ["none"])[0])
        numbered = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise DetectorError(f"detector {name}: config.json is no configuration of transformers ({error})") from error
    if not architecture.endswith("ForObjectDetection"):
        raise DetectorError(f"detector {name}: its architecture is {architecture}, expected one …ForObjectDetection")
    if config.get("model_type") in _OPEN_VOCABULARY:
        return DetectorKind.OPEN_VOCABULARY, ()
    return DetectorKind.TRANSFORMERS, tuple(numbered[number] for number in sorted(numbered))


def _examine_onnx(name: str, path: Path) -> DetectorFiles:
    beside = [classes_file(path), path.with_name(f"{path.name}.data")]
    found = _named([path, *(file for file in beside if file.is_file())])
    return DetectorFiles(name=name, kind=DetectorKind.ONNX, identity=found, classes=onnx_classes(path))


def _named(files: Iterable[Path]) -> str:
    return f"sha256:{identity(files)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f", … ({len(names)})" if len(names) > _NAMED else "")


# ------------------------------------------------------------------------------------------ class names of ONNX files


def classes_file(path: Path) -> Path:
    """Where people write an ONNX file's class names, one a line; `coco` alone stands for COCO's eighty."""
    return path.with_suffix(".classes.txt")


def onnx_classes(path: Path) -> tuple[str, ...]:
    """The class names of an ONNX detector: of its classes file, else of its metadata entry `names` or `classes`.

    Such a graph gives class numbers and says nowhere how many there are. Raises DetectorError where no names are told.
    """
    sidecar = classes_file(path)
    if sidecar.is_file():
        names = tuple(line.strip() for line in sidecar.read_text("utf-8-sig").splitlines() if line.strip())
        return COCO_CLASSES if names == ("coco",) else names
    metadata = _onnx_metadata(path)
    told = metadata.get("names") or metadata.get("classes")
    if told is None:
        raise DetectorError(
            f"detector {path}: names no classes; write them, one a line in the order of their numbers, into {sidecar} "
            "(the single line `coco` stands for COCO's eighty)"
        )
    return _parse_names(path, told)


def _parse_names(path: Path, told: str) -> tuple[str, ...]:
    """Names as exporters write them: a list, or number -> name, in Python's or JSON's quotes."""
    try:
        value = ast.literal_eval(told)
        names = [value[number] for number in sorted(value, key=int)] if isinstance(value, dict) else list(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        names = []
    if not names or not all(isinstance(name, str) for name in names):
        raise DetectorError(
            f"detector {path}: its metadata names classes as {told[:80]!r}, expected a list of names; "
            f"or write them, one a line, into {classes_file(path)}"
        )
    return tuple(names)


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
# fmt: on
