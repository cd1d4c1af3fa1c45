"""Classifiers: which of a job's words a mask shows. Their files, and how one is loaded.

Without torch. Only `load_classifier` imports the vendor's library, in the worker's child process.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from workers.classifiers.asked import AskedClassifier, Classified, ClassifierError
from workers.models.files import weights_dir
from workers.models.folders import checkpoint_files, has_weights, identity
from workers.models.loading import require_libraries
from workers.paths import own_path

if TYPE_CHECKING:  # NumPy and Pillow, for commands that never see a pixel
    from workers.images.pixels import RgbImage
    from workers.masks import Mask

MAX_WORDS = 200
MAX_WORD_CHARS = 100
_FAMILIES = ("clip", "siglip")  # model_type in config.json


class Classifier(Protocol):
    """A loaded classifier that knows a job's words. Stateless; threads may share it."""

    def classify(
        self, image: RgbImage, masks: Sequence[Mask], go_on: Callable[[], None]
    ) -> Iterator[tuple[Mask, Classified]]:
        """Each mask of an image with its best word, in their order. go_on: called after each batch.

        May raise torch.cuda.OutOfMemoryError. Raises ModelOutputError when scores are NaN.
        """
        ...


def examine(name: str) -> tuple[str, str]:
    """Find a classifier by a path, a name in the weights folder or a hub name. Returns its stored name and identity.

    Local files are read completely. Raises ClassifierError, which says what was found and what to do.
    """
    path = own_path(name)
    if path.exists():
        return str(path.absolute()), _identity(name, path)
    kept = weights_dir() / name
    if kept.exists():
        return name, _identity(name, kept)
    absent = f"classifier {name}: no such folder, here or in {weights_dir()}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ClassifierError(absent)
    require_libraries(f"{absent}; to look for it on the hub, it", ("huggingface_hub",))
    from huggingface_hub import hf_hub_download

    try:
        # From the local cache when the hub is not reachable. In both cases the folder's name is the commit.
        config = Path(hf_hub_download(name, "config.json"))
        _require_family(name, config.read_bytes())
    except (OSError, ValueError) as error:
        raise ClassifierError(f"{absent}, and not on the hub: {error}") from error
    return name, f"commit:{config.parent.name}"


def load_classifier(asked: AskedClassifier) -> Classifier:
    """The classifier of a job on this process's device. Its checkpoint is loaded at the first call and kept.

    Raises ClassifierError when its files are missing, or when the job was submitted with other files;
    MissingLibraryError without transformers.
    """
    require_libraries("--classify", ("transformers",))
    path = None
    if not asked.identity.startswith("commit:"):
        path = weights_dir() / asked.name  # an absolute name stays as it is
        if not path.exists():
            raise ClassifierError(
                f"classifier {asked.name}: nothing at {path} on this machine; put the job's files there"
            )
        found = _identity(asked.name, path)
        if found != asked.identity:
            raise ClassifierError(
                f"classifier {asked.name}: {path} is {found}, but the job was submitted with {asked.identity}; put the "
                "same files there, or submit again"
            )
    made: Classifier = importlib.import_module("workers.classifiers.clip").load(asked, path)
    return made


def _identity(name: str, folder: Path) -> str:
    try:
        if not (folder / "config.json").is_file():
            raise ClassifierError(
                f"classifier {name}: expected the folder of a CLIP or SigLIP checkpoint, with config.json"
            )
        if not has_weights(folder):
            raise ClassifierError(
                f"classifier {name}: no .safetensors file; pickled weights could run code and are not loaded"
            )
        _require_family(name, (folder / "config.json").read_bytes())
        tokenizers = sorted(folder.glob("*.model"))  # SigLIP's, which sentencepiece reads
        return f"sha256:{identity([*checkpoint_files(folder), *tokenizers])}"
    except OSError as error:
        raise ClassifierError(f"classifier {name}: cannot be read ({error})") from error


def _require_family(name: str, config: bytes) -> None:
    try:
        family = json.loads(config).get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ClassifierError(
            f"classifier {name}: config.json is not a transformers configuration ({error})"
        ) from error
    if family not in _FAMILIES:
        expected = " or ".join(_FAMILIES)
        raise ClassifierError(f"classifier {name}: its model_type is {str(family)[:60]!r}, expected {expected}")
