"""Where transformers finds a detector: a folder of this machine, or the hub at the job's commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.detectors.detector import AskedDetector


def whence(asked: AskedDetector, path: Path | None) -> tuple[str, dict[str, Any]]:
    """Where from_pretrained finds a job's checkpoint: its folder, or the hub at the job's commit."""
    if path is None:
        return asked.name, {"revision": asked.identity.removeprefix("commit:")}
    return str(path), {"local_files_only": True}
