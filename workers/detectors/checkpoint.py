"""Where transformers finds a detector: in a folder of this machine, or on the hub at the job's commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.detectors.detector import AskedDetector


def where_to_load(asked: AskedDetector, path: Path | None) -> tuple[str, dict[str, Any]]:
    """The arguments with which from_pretrained loads a job's checkpoint: its folder, or its hub name and commit."""
    if path is None:
        return asked.name, {"revision": asked.identity.removeprefix("commit:")}
    return str(path), {"local_files_only": True}
