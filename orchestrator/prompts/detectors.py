"""From --detector, its options and --text to what is stored on a job's row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from db.texts import is_storable
from workers.class_names import decode_text, shallow
from workers.detectors.detector import AskedDetector
from workers.detectors.files import examine, require_classes
from workers.detectors.kinds import DetectorError, DetectorKind
from workers.paths import own_path
from workers.prompts import Prompt, PromptError, parse_prompt

# A phrase's boxes score lower than a class's. Grounding DINO's and OWLv2's authors ask for 0.25 to 0.4 and 0.1 to 0.3.
_DEFAULT_THRESHOLDS = {
    DetectorKind.TRANSFORMERS: 0.5,
    DetectorKind.ONNX: 0.5,
    DetectorKind.OPEN_VOCABULARY: 0.3,
}


def read_phrases(words: Sequence[str]) -> list[Prompt]:
    r"""Read `phrase` or `phrase:label` as prompts by text with their labels. Write a colon inside the phrase as `\:`.

    Raises PromptError for a phrase that is empty or comes twice.
    """
    phrases = [_read_phrase(word) for word in words]
    for n, phrase in enumerate(phrases):
        if phrase.text in (earlier.text for earlier in phrases[:n]):
            raise PromptError(f"--text {phrase.text!r} comes twice")
    return phrases


def _read_phrase(word: str) -> Prompt:
    parts = [part.replace(r"\:", ":").strip() for part in re.split(r"(?<!\\):", word)]
    if len(parts) > 2 or not all(parts):
        raise PromptError(rf"--text {word!r}: expected a phrase, or phrase:label; a colon of the phrase is written \:")
    return parse_prompt({"text": parts[0], "label": parts[-1]})


def read_detector(
    name: str, *, threshold: float | None = None, classes: str | None = None, label_map: Path | None = None
) -> AskedDetector:
    """Find the detector and check what is asked of it. classes: separated by commas; None or empty for all.

    Raises DetectorError for a missing file, a file that is no detector, an unknown class, or an unreadable label map.
    """
    files = examine(name)
    if files.kind is DetectorKind.OPEN_VOCABULARY and (classes or label_map):
        raise DetectorError(f"detector {name} has no classes of its own: --text phrase:label says what it looks for")
    wanted = tuple(dict.fromkeys(word.strip() for word in (classes or "").split(",") if word.strip()))
    require_classes(files, wanted)
    return AskedDetector(
        name=files.name,
        kind=files.kind,
        identity=files.identity,
        threshold=_DEFAULT_THRESHOLDS[files.kind] if threshold is None else threshold,
        classes=wanted,
        label_map=read_label_map(label_map) if label_map else None,
    )


def read_label_map(path: Path) -> dict[str, str | None]:
    """Read a YAML or JSON object: a detector's class -> the team's label, or null to drop the class.

    Raises DetectorError with the first bad entry.
    """
    try:
        text = shallow(decode_text(own_path(path).read_bytes()))
        value = yaml.load(text, Loader=_WordsOrNull)  # noqa: S506  it makes text and null
    except OSError as error:
        raise DetectorError(f"{path}: cannot be read ({error.strerror}); expected a label map") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DetectorError(f"{path}: neither YAML nor JSON: {error}") from error
    if not isinstance(value, dict) or not value:
        raise DetectorError(f"{path}: expected lines such as `car: vehicle`, and `kite: null` for a class to drop")
    for name, label in value.items():
        if not _is_name(name) or not (label is None or _is_name(label)):
            raise DetectorError(f"{path}: {name!r}: {label!r}, expected a class and its label, or null to drop it")
    return value


class _WordsOrNull(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types of its own
    """Reads scalars as the text in the file (no, 1.10, 2024-01-01 are names here), and null as None."""


_WordsOrNull.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_storable(value)
