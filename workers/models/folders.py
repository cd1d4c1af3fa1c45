"""Checkpoints that are folders: config.json, weights as safetensors, and the files that prepare their input.

They have no pinned sha256. Their authors fix such folders in place, or give them only to people who accept a licence.
Instead, their own content identifies them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

PATTERNS = ("*.json", "*.txt", "*.safetensors")  # what from_pretrained reads; never a pickled pytorch_model.bin

Stamp = tuple[tuple[str, int, int], ...]  # name, size and time of change of each file


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a folder that belong to its checkpoint, by name. Subfolders are ignored."""
    return sorted(file for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file())


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a loadable checkpoint, judged by the names of its files."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def identity(files: Iterable[Path]) -> str:
    """sha256 (64 hex digits) of the files' names and contents. The files are read again only after a change."""
    listed = list(files)
    folder = listed[0].parent if listed else Path()
    stats = [(file.name, file.stat()) for file in listed]
    return _identity(folder, tuple((name, found.st_size, found.st_mtime_ns) for name, found in stats))


@lru_cache(maxsize=16)
def _identity(folder: Path, stamp: Stamp) -> str:
    digest = hashlib.sha256()
    for name, _, _ in stamp:
        with (folder / name).open("rb") as opened:
            digest.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
