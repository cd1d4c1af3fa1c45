"""From the words of --detector, --detector-threshold, --classes and --label-map to what goes on a job's row."""

from __future__ import annotations

from pathlib import Path

import yaml

from workers.detector_files import DetectorError, examine, require_classes
from workers.detectors import DEFAULT_THRESHOLD, AskedDetector
from workers.prompts import is_storable


def read_detector(
    name: str, *, threshold: float | None = None, classes: str | None = None, label_map: Path | None = None
) -> AskedDetector:
    """Find the detector and check what is asked of it. classes: separated by commas; None or empty for all.

    Raises DetectorError for a detector that is not there or not one, an unknown class, a label map that cannot be read.
    """
    files = examine(name)
    wanted = tuple(dict.fromkeys(word.strip() for word in (classes or "").split(",") if word.strip()))
    require_classes(files, wanted)
    return AskedDetector(
        name=files.name,
        kind=files.kind,
        identity=files.identity,
        threshold=DEFAULT_THRESHOLD if threshold is None else threshold,
        classes=wanted,
        label_map=read_label_map(label_map) if label_map else None,
    )


def read_label_map(path: Path) -> dict[str, str | None]:
    """Read a YAML or JSON object of a detector's class -> the team's label, null for what is to be dropped.

    Raises DetectorError naming the entry that is no such thing.
    """
    try:
        value = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise DetectorError(f"{path}: cannot be read ({error.strerror}); expected a label map") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DetectorError(f"{path}: neither YAML nor JSON: {error}") from error
    if not isinstance(value, dict) or not value:
        raise DetectorError(f"{path}: expected lines such as `car: vehicle`, and `kite: null` for a class to drop")
    for name, label in value.items():
        if not _is_name(name) or not (label is None or _is_name(label)):
            raise DetectorError(
                f"{path}: {name!r}: {label!r}, expected a class and its label, or null to drop it; "
                'YAML reads yes, no, on, off and numbers as other things unless they are quoted, as in "no": person'
            )
    return value


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_storable(value)
