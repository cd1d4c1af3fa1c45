"""A job's request to a classifier, and its answer about a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from workers.models.spec import ModelError

BACKGROUND = "background"  # always asked beside a job's words


class ClassifierError(ModelError):
    """A classifier cannot be used as requested. The message says which one, what was found and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedClassifier:
    """A job's request to a classifier. name: an absolute path, a name in the weights folder, or a hub name.

    identity: "sha256:" of its files, or "commit:" of the hub. words: the labels to choose from. threshold: 0..1; a mask
    whose best word scores lower stays without a label.
    """

    name: str
    identity: str
    words: tuple[str, ...]
    threshold: float

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ClassifierError(f"classify threshold {self.threshold}: expected 0..1")

    def as_json(self) -> dict[str, Any]:
        """The request as JSON-safe values. `asked_of_json` reads it back."""
        return {**asdict(self), "words": list(self.words)}

    def what_is_computed(self) -> dict[str, Any]:
        """The parts of the request that change labels. The files' place and the order of the words do not."""
        return {"identity": self.identity, "words": sorted(self.words), "threshold": self.threshold}


def asked_of_json(stored: Mapping[str, Any]) -> AskedClassifier:
    """Read back what `AskedClassifier.as_json` stored on a job's row."""
    return AskedClassifier(**{**stored, "words": tuple(stored["words"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """A mask's best word, which may be BACKGROUND, and its share of the softmax, 0..1."""

    word: str
    score: float
