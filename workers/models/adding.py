"""Adds a model of one's own from a checkpoint: `python -P -m workers.models.adding`, for `maskfleet models add`.

A process of its own, because it needs torch, which no command loads. It reads the file without running code in it,
checks every name, shape and value, and stores the tensors as NAME.safetensors with NAME.toml.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from io import BufferedRandom
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from workers.errors import printable
from workers.models.files import weights_dir
from workers.models.loading import require_libraries
from workers.models.own import OwnModel, weights_file, write_own
from workers.models.part_file import drop, exclusive_part
from workers.models.registry import architecture_of, require_free_name
from workers.models.sam2 import image_tensors, known_architectures
from workers.models.spec import ModelError, WeightsError
from workers.models.state_dicts import DAMAGED, differences, fitting_model, read_tensors, shapes_of, some, state_on_meta
from workers.models.weights import BARE_PICKLE, SAFETENSORS, TORCH_ARCHIVE, file_kind

_WRAPPERS = ("model", "model_state", "model_state_dict", "state_dict")
_PREFIXES = ("module.", "sam.")
_SHOWN = 10


def add(name: str, file: Path, architecture: str, *, origin: str, licence: str) -> OwnModel:
    """Store a checkpoint's tensors as the model `name`.

    Raises WeightsError when the file cannot be read, when its tensors are not those of the architecture, hold NaN or
    infinity, or when the name is taken.
    """
    state = _image_state(file)
    _require_fit(file, state, architecture)
    _require_numbers(file, state)
    path = weights_dir() / weights_file(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_part(path) as part:
            require_free_name(name)
            written = _write(state, part)
            with written.open("rb") as opened:
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
            model = OwnModel(
                name=name,
                architecture=architecture,
                sha256=sha256,
                size_bytes=written.stat().st_size,
                parameter_count=architecture_of(architecture).parameter_count,
                origin=origin,
                licence=licence,
                added=datetime.now(UTC).date(),
            )
            written.replace(path)
            drop(part)
            write_own(model)
    except (OSError, SafetensorError) as error:  # the latter from save_file, also for a full disk
        said = (error.strerror if isinstance(error, OSError) else None) or error
        raise WeightsError(f"{name}: cannot write {path}: {said}") from error
    return model


def _image_state(file: Path) -> dict[str, Tensor]:
    """The file's tensors by name, without wrappers, prefixes and what only videos need."""
    try:
        _require_kind(file)
        found = read_tensors(file, may_be_old=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file}: holds pickled objects other than tensors, which are not loaded because they could run code; save "
            "its state dict alone: torch.save(model.state_dict(), FILE)"
        ) from error
    except DAMAGED as error:
        raise WeightsError(f"{file}: cannot be read as a checkpoint, cut off or damaged ({error})") from error
    state = _unwrapped(found)
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{file}: holds {_described(found)}, expected tensors by name")
    if wrong := [str(name) for name, value in state.items() if not _is_plain(name, value)]:
        raise WeightsError(f"{file}: holds other things than plain tensors: {some(wrong, _SHOWN)}")
    for prefix in (*_PREFIXES, *_PREFIXES):  # either, or both in any order
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return image_tensors(state)


def _require_kind(file: Path) -> None:
    """Say what else the file is, such as a web page: torch would take it for pickled code."""
    kind = file_kind(file)
    by_torch = file.suffix != ".safetensors"  # by this suffix torch refuses what it wrote itself
    known = (SAFETENSORS, TORCH_ARCHIVE, BARE_PICKLE) if by_torch else (SAFETENSORS,)  # a pickle: before torch 1.6
    if kind not in known:
        expected = "torch.save or safetensors" if by_torch else "safetensors"
        raise WeightsError(f"{file}: cannot be read as a checkpoint: it is {kind}, expected what {expected} writes")


def _unwrapped(found: object) -> object:
    """The dict below a training script's keys, which may be nested once."""
    for _ in range(2):
        inside = [found[key] for key in _WRAPPERS if key in found] if isinstance(found, dict) else []
        inside = [value for value in inside if isinstance(value, dict)]
        found = inside[0] if inside else found
    return found


def _is_plain(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    has_values = value.layout is torch.strided and not value.is_meta
    return has_values and not value.is_quantized and not value.is_complex()


def _described(found: object) -> str:
    return f"entries {some(map(str, found), _SHOWN)}" if isinstance(found, dict) else f"a {type(found).__name__}"


def _require_fit(file: Path, state: Mapping[str, Tensor], architecture: str) -> None:
    known = known_architectures()
    expected = state_on_meta(known[architecture])
    shapes, found = shapes_of(expected), shapes_of(state)
    if shapes != found:
        other = fitting_model(found, known)
        advice = "no architecture that is known here fits" if other is None else f"it fits --architecture {other}"
        raise WeightsError(f"{file}: not {architecture}: {differences(shapes, found, shown=_SHOWN)}; {advice}")
    kinds = [name for name in expected if expected[name].is_floating_point() != state[name].is_floating_point()]
    if kinds:
        raise WeightsError(
            f"{file}: not {architecture}: {len(kinds)} of another kind of number ({some(kinds, _SHOWN)})"
        )


def _require_numbers(file: Path, state: Mapping[str, Tensor]) -> None:
    """They are used as float32, so a float64 that is too large for it counts too."""
    wrong = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor.float()).all())]
    if wrong:
        raise WeightsError(f"{file}: {len(wrong)} tensors hold NaN or infinity ({some(wrong, _SHOWN)})")


def _write(state: Mapping[str, Tensor], part: BufferedRandom) -> Path:
    """Write a safetensors file beside `part`, whose lock is held. The same tensors give the same bytes.

    safetensors replaces the file that it writes, and with it a lock. So this is another file, with the part's rights.
    """
    whole = Path(f"{part.name}.whole")
    own = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    save_file(own, whole, metadata={"format": "pt"})
    with whole.open("rb+") as written:
        os.fchmod(written.fileno(), stat.S_IMODE(os.fstat(part.fileno()).st_mode))
        os.fsync(written.fileno())
    return whole


def main(name: str, file: str, architecture: str, origin: str, licence: str) -> None:
    require_libraries(architecture, architecture_of(architecture).libraries)
    model = add(name, Path(file), architecture, origin=origin, licence=licence)
    sys.stdout.write(f"{weights_dir() / weights_file(model.name)}\n")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ModelError as failure:
        sys.exit(f"maskfleet: {printable(str(failure))}")  # the names of tensors are those of a foreign file
