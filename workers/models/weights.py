"""Checks weights files. Never loads torch, so the command line can use it.

A pinned sha256 decides whether a file is right. Names, sizes and headers only help to say what else the file is.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from workers.models.files import weights_path
from workers.models.folders import checkpoint_files, has_weights, identity
from workers.models.registry import MODELS
from workers.models.spec import ModelSpec, WeightsError

SAFETENSORS, TORCH_ARCHIVE = "a safetensors file", "a torch archive"  # kinds of files that hold weights
BARE_PICKLE = "a bare pickle, which is not loaded because it could run code"

log = logging.getLogger(__name__)


class WeightsState(StrEnum):
    """What was found at a model's path."""

    OK = "ok"
    ABSENT = "absent"
    TRUNCATED = "truncated"
    OTHER_MODEL = "other_model"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What `verify` found at `path`. found: a phrase for people. size_bytes: None when there is no file."""

    name: str
    path: Path
    state: WeightsState
    size_bytes: int | None
    found: str

    @property
    def ok(self) -> bool:
        return self.state is WeightsState.OK


def verify(spec: ModelSpec) -> Verified:
    """Find out what is at this model's path. Reads the whole file only when its size is that of a known model.

    Raises WeightsError when the file cannot be read.
    """
    path = weights_path(spec)
    if spec.hub is not None:
        return _verify_folder(spec, path)
    try:
        state, size_bytes, found = _look_at(path, spec)
    except FileNotFoundError:
        return Verified(name=spec.name, path=path, state=WeightsState.ABSENT, size_bytes=None, found="no file")
    except OSError as error:
        raise WeightsError(f"{spec.name}: cannot read {path}: {error.strerror or error}") from error
    return Verified(name=spec.name, path=path, state=state, size_bytes=size_bytes, found=found)


def remedy(spec: ModelSpec) -> str:
    """The command that gives the right file."""
    if spec.is_own:
        return f"run `maskfleet models pull {spec.name}` if a mirror has it, else `maskfleet models add` it again"
    if spec.url is None and spec.hub is None:
        return "it belongs to the package: reinstall maskfleet"
    return f"run `maskfleet models pull {spec.name}`"


def kind_of(head: bytes) -> str:
    """Name a file's format from its first 512 bytes, as a phrase for people. Compare it with `expected_kind`."""
    text = head.lstrip().lower()
    if head.startswith(b"PK\x03\x04"):
        return TORCH_ARCHIVE
    # A safetensors file begins with the length of its header, in 8 bytes. The upper bytes are always zero.
    if head[4:9] == b"\0\0\0\0{":
        return SAFETENSORS
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if text.startswith(b"<"):
        return "an XML document"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself"
    if head.startswith(b"\x80"):
        return BARE_PICKLE
    return f"a file of unknown format (starts {head[:16]!r})"


def file_kind(path: Path) -> str:
    """`kind_of` a file. Raises OSError."""
    with path.open("rb") as file:
        return kind_of(file.read(512))


def expected_kind(path: Path) -> str:
    """What `kind_of` should return for a file with this suffix."""
    return SAFETENSORS if path.suffix == ".safetensors" else TORCH_ARCHIVE


def _verify_folder(spec: ModelSpec, folder: Path) -> Verified:
    """Check the path of a model that comes as a folder. Only loading it can show whether it is the right one."""
    state, size_bytes, found = WeightsState.ABSENT, None, "no folder with config.json and safetensors"
    try:
        if has_weights(folder):
            files = checkpoint_files(folder)
            size_bytes = sum(file.stat().st_size for file in files)
            state, found = WeightsState.OK, f"a checkpoint with sha256 {identity(files)}"
    except OSError as error:
        raise WeightsError(f"{spec.name}: cannot read {folder}: {error.strerror or error}") from error
    return Verified(name=spec.name, path=folder, state=state, size_bytes=size_bytes, found=found)


def _look_at(path: Path, spec: ModelSpec) -> tuple[WeightsState, int, str]:
    size_bytes = path.stat().st_size
    known = [model for model in (spec, *MODELS.values()) if model.hub is None]
    with path.open("rb") as file:
        kind = kind_of(file.read(512))
        file.seek(0)
        # A file of another size is none of these, so there is no need to read it whole.
        sized_like_one = size_bytes in {model.size_bytes for model in known}
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if sized_like_one else ""
    if sha256 == spec.sha256:
        return WeightsState.OK, size_bytes, "the file that was added" if spec.is_own else "the published file"
    for model in known:
        if sha256 == model.sha256:
            return WeightsState.OTHER_MODEL, size_bytes, f"the published file of {model.name}"
    if size_bytes > 0 and kind != expected_kind(path):
        return WeightsState.WRONG, size_bytes, kind
    if size_bytes == spec.size_bytes:
        return WeightsState.WRONG, size_bytes, f"another or damaged file, with sha256 {sha256}"
    # A torch archive has its directory at the end. If that is there, the file was not cut.
    if size_bytes < spec.size_bytes and not zipfile.is_zipfile(path):
        return WeightsState.TRUNCATED, size_bytes, f"truncated: {size_bytes:,} of {spec.size_bytes:,} bytes"
    return WeightsState.WRONG, size_bytes, f"another file: {size_bytes:,} bytes, expected {spec.size_bytes:,}"


def name_of(sha256: str) -> str:
    known = (model.name for model in MODELS.values() if model.sha256 == sha256)
    return next((f"the published file of {name}" for name in known), f"another file, with sha256 {sha256}")
