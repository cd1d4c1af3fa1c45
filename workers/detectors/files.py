"""A detector's files: how to find them by path or name, their kind, their identity by content, and their class names.

Without torch and the libraries that run detectors. The command line checks the files here before any worker gets a job.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workers.detectors.kinds import DetectorError, DetectorKind
from workers.detectors.onnx_file import external_files
from workers.detectors.onnx_names import classes_file, onnx_classes
from workers.models.files import weights_dir
from workers.models.folders import checkpoint_files, has_weights, identity
from workers.models.loading import require_libraries
from workers.paths import own_path

_NAMED = 12  # class names in a message

# The model types, in config.json, of the checkpoints that AutoModelForZeroShotObjectDetection loads.
_OPEN_VOCABULARY = frozenset({"grounding-dino", "mm-grounding-dino", "owlvit", "owlv2"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorFiles:
    """The description of a detector before it is loaded.

    name: as stored with a job: an absolute path, a name in the weights folder, or a hub name. identity: "sha256:" of
    its files, or "commit:" of the hub. classes: its class names in its order; empty when its files do not name them, or
    when it takes phrases.
    """

    name: str
    kind: DetectorKind
    identity: str
    classes: tuple[str, ...]


def examine(name: str) -> DetectorFiles:
    """Find a detector by a path, a name in the weights folder or a hub name, and describe it without loading it.

    Local files are read completely, for their identity. Raises DetectorError, which says what was found and what to do.
    """
    path = own_path(name)
    if path.exists():
        return _examine_local(str(path.absolute()), path)
    kept = weights_dir() / name
    if kept.exists():
        return _examine_local(name, kept)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".onnx"):
        raise DetectorError(f"detector {name}: no such file or folder, here or in {weights_dir()}")
    return _examine_on_hub(name)


def require_classes(files: DetectorFiles, wanted: Collection[str]) -> None:
    """Raise DetectorError for a class that the detector does not have. Only checked when its files name its classes."""
    unknown = [name for name in wanted if name not in files.classes] if files.classes else []
    if unknown:
        raise DetectorError(f"detector {files.name} has no class {unknown[0]!r}; it has {_listed(files.classes)}")


def require_library(kind: DetectorKind) -> None:
    """Raise MissingLibraryError when the library that runs such detectors is not installed."""
    require_libraries(f"a detector ({kind})", ("onnxruntime" if kind is DetectorKind.ONNX else "transformers",))


def require_same_files(name: str, asked: str) -> Path | None:
    """The path of a job's detector on this machine. None for a detector of the hub, which its commit identifies.

    Raises DetectorError when the files are absent, or when the job was submitted with other files.
    """
    if asked.startswith("commit:"):
        return None
    path = weights_dir() / name  # an absolute name stays as it is
    if not path.exists():
        raise DetectorError(f"detector {name}: nothing at {path} on this machine; put the job's detector there")
    found = _examine_local(name, path)
    if found.identity != asked:
        raise DetectorError(
            f"detector {name}: {path} is {found.identity}, but the job was submitted with {asked}; put the same files "
            "there, or submit again"
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
            "give the checkpoint as safetensors, as transformers' save_pretrained writes it"
        )
    kind, classes = _read_config(name, (folder / "config.json").read_bytes())
    return DetectorFiles(name=name, kind=kind, identity=_named(checkpoint_files(folder)), classes=classes)


def _examine_on_hub(name: str) -> DetectorFiles:
    absent = f"detector {name}: no such file or folder, here or in {weights_dir()}"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise DetectorError(f"{absent}; to look for it on the hub, pip install 'maskfleet[models]'") from error
    try:
        # From the local cache when the hub is not reachable. In both cases the folder's name is the commit.
        config = Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        raise DetectorError(f"{absent}, and not on the hub: {error}") from error
    kind, classes = _read_config(name, config.read_bytes())
    return DetectorFiles(name=name, kind=kind, identity=f"commit:{config.parent.name}", classes=classes)


def _read_config(name: str, content: bytes) -> tuple[DetectorKind, tuple[str, ...]]:
    """The kind of checkpoint that a config.json describes, and its class names in the order of their numbers."""
    try:
        config = json.loads(content)
        architecture = str((config.get("architectures") or ["none"])[0])
        numbered = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise DetectorError(f"detector {name}: config.json is not a transformers configuration ({error})") from error
    if not architecture.endswith("ForObjectDetection"):
        raise DetectorError(f"detector {name}: its architecture is {architecture}, expected one …ForObjectDetection")
    if config.get("model_type") in _OPEN_VOCABULARY:
        return DetectorKind.OPEN_VOCABULARY, ()
    return DetectorKind.TRANSFORMERS, tuple(numbered[number] for number in sorted(numbered))


def _examine_onnx(name: str, path: Path) -> DetectorFiles:
    classes = onnx_classes(path)
    names = classes_file(path)
    found = _named([path, *external_files(path), *([names] if names.is_file() else [])])
    return DetectorFiles(name=name, kind=DetectorKind.ONNX, identity=found, classes=classes)


def _named(files: Iterable[Path]) -> str:
    return f"sha256:{identity(files)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f", … ({len(names)})" if len(names) > _NAMED else "")


# fmt: on
