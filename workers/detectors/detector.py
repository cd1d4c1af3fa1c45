"""Detectors: models that find boxes, which become a job's prompts. A job's request to one, and its answers.

Without torch. Only `load` imports the vendor's library, in the worker's child process.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from workers.detectors.files import require_library, require_same_files
from workers.detectors.kinds import DetectorError, DetectorKind
from workers.prompts import BoxXyxy, Prompt, PromptError, fit

if TYPE_CHECKING:  # NumPy and Pillow, for commands that never see a pixel
    from workers.images.pixels import RgbImage

_LOADERS = {
    DetectorKind.TRANSFORMERS: "workers.detectors.transformers_detector",
    DetectorKind.OPEN_VOCABULARY: "workers.detectors.open_vocabulary",
    DetectorKind.ONNX: "workers.detectors.onnx_detector",
}

Asked = tuple[Prompt, dict[str, Any]]
"""A prompt fitted to its image, and the JSON that its masks' rows store about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedDetector:
    """A job's request to a detector. threshold: 0..1, boxes above it count. classes: the kept classes; empty: all.

    label_map: class -> the team's label; None drops the class. A class that is not in it keeps its own name.
    """

    name: str
    kind: DetectorKind
    identity: str
    threshold: float
    classes: tuple[str, ...] = ()
    label_map: Mapping[str, str | None] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise DetectorError(f"detector threshold {self.threshold}: expected 0..1")

    def as_json(self) -> dict[str, Any]:
        """The request as JSON-safe values. `asked_of_json` reads it back."""
        return {**asdict(self), "kind": str(self.kind), "classes": list(self.classes)}

    def what_is_computed(self) -> dict[str, Any]:
        """The parts of the request that change masks or labels. The files' place and the order of classes do not."""
        return {
            "identity": self.identity,
            "threshold": self.threshold,
            "classes": sorted(self.classes),
            "label_map": dict(self.label_map) if self.label_map is not None else None,
        }

    def keeps(self, class_name: str) -> bool:
        """Whether boxes of this class become prompts."""
        if self.classes and class_name not in self.classes:
            return False
        return (self.label_map or {}).get(class_name, class_name) is not None

    def label_of(self, class_name: str) -> str:
        """The label of a kept class."""
        return (self.label_map or {}).get(class_name) or class_name


def asked_of_json(stored: Mapping[str, Any]) -> AskedDetector:
    """Read back what `AskedDetector.as_json` stored on a job's row."""
    return AskedDetector(
        **{**stored, "kind": DetectorKind(stored["kind"]), "classes": tuple(stored["classes"])},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One box of a detector, in pixels of the upright image. It is not checked: it may be NaN, inverted or outside."""

    class_name: str
    score: float
    box_xyxy: BoxXyxy


class Detector(Protocol):
    """A loaded detector with its own classes. Stateless; threads may share it."""

    def detect(self, images: Sequence[RgbImage], *, threshold: float) -> list[list[Detection]]:
        """The boxes above the threshold for each image, in the order of the images: (H, W, 3) uint8 RGB of any sizes.

        May raise torch.cuda.OutOfMemoryError; fewer images need less memory. Raises ModelOutputError when scores are
        NaN.
        """
        ...


class PhraseDetector(Protocol):
    """A loaded detector that finds boxes for phrases. Stateless; threads may share it."""

    def find(self, image: RgbImage, phrases: Sequence[str], *, threshold: float) -> list[list[Detection]]:
        """The boxes above the threshold for each phrase, in the order of the phrases. Phrases do not affect each other.

        A detection's class_name is its phrase. May raise torch.cuda.OutOfMemoryError. Raises PromptError for a phrase
        that is too long, ModelOutputError when scores are NaN.
        """
        ...


def prompts_of(
    detections: Sequence[Detection], asked: AskedDetector, size_wh: tuple[int, int]
) -> tuple[list[Asked], list[str]]:
    """Boxes as prompts fitted to an image of this size, and a reason for each box that cannot be used.

    Each prompt comes with the JSON for its masks' rows. `index` counts the detector's boxes. `class` is the detector's
    own name of the class.
    """
    usable: list[Asked] = []
    wrong: list[str] = []
    for index, found in enumerate(detections):
        label = asked.label_of(found.class_name)
        try:
            prompt = fit(Prompt(box_xyxy=found.box_xyxy, score=found.score, label=label), size_wh)
        except PromptError as error:
            wrong.append(f"box {index} ({found.class_name}): {error}")
            continue
        usable.append((prompt, {"index": index, "class": found.class_name, **prompt.as_json()}))
    return usable, wrong


def boxes_of_phrases(
    detector: PhraseDetector, image: RgbImage, prompts: Sequence[Asked], threshold: float
) -> tuple[list[Asked], list[str]]:
    """Replace each text prompt of an image by the boxes that the detector finds for it: any number.

    Also returns a reason for each box that cannot be used. A prompt with a box or points keeps them; its text becomes
    its label. The row of a found box has the prompt's number and text, the box and its score. Raises errors of `find`.
    """
    phrases = list(dict.fromkeys(prompt.text for prompt, _ in prompts if prompt.text and _is_text_alone(prompt)))
    boxes = dict(zip(phrases, detector.find(image, phrases, threshold=threshold) if phrases else [], strict=True))
    usable: list[Asked] = []
    wrong: list[str] = []
    for prompt, row in prompts:
        if prompt.text is None or not _is_text_alone(prompt):
            usable.append((replace(prompt, text=None, label=prompt.label or prompt.text), row))
            continue
        for found in boxes[prompt.text]:
            try:
                boxed = _box_of_phrase(found, prompt, image)
            except PromptError as error:
                wrong.append(f"a box of {prompt.text!r}: {error}")
                continue
            in_pixels = {name: value for name, value in row.items() if name != "size_wh"}
            usable.append((boxed, {**in_pixels, "box_xyxy": boxed.box_xyxy, "score": boxed.score}))
    return usable, wrong


def _is_text_alone(prompt: Prompt) -> bool:
    return prompt.kinds == {"text"}


def _box_of_phrase(found: Detection, prompt: Prompt, image: RgbImage) -> Prompt:
    label = prompt.label or prompt.text
    return fit(Prompt(box_xyxy=found.box_xyxy, score=found.score, label=label), (image.shape[1], image.shape[0]))


_loaded: dict[tuple[str, str, str], Detector | PhraseDetector] = {}
_loading = threading.Lock()


def load(asked: AskedDetector, device: str) -> Detector | PhraseDetector:
    """The detector of a job on this device ("cpu", "cuda:0"), loaded at the first call and kept.

    Raises DetectorError when its library or files are missing, or when the job was submitted with other files.
    """
    key = (asked.name, asked.identity, device)
    with _loading:
        if key not in _loaded:
            require_library(asked.kind)
            path = require_same_files(asked.name, asked.identity)
            module = importlib.import_module(_LOADERS[asked.kind])
            loaded: Detector | PhraseDetector = module.load(asked, path, device)
            _loaded[key] = loaded
        return _loaded[key]
