"""Tensors by name: reads them from a file without running code in it, and compares them with an architecture."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from workers.models.weights import SAFETENSORS, file_kind

Architecture = Callable[[], Any]  # Sam, or a module with its own state dict
Shapes = dict[str, tuple[int, ...]]
# What `read_tensors` raises for damaged files, beside pickle.UnpicklingError: torch calls what the file names, with
# what the file has.
DAMAGED = (
    *(SafetensorError, RuntimeError, ValueError, LookupError, EOFError, OSError),
    *(TypeError, AttributeError, AssertionError, ArithmeticError, struct.error),
)


def read_tensors(path: Path, *, may_be_old: bool = False) -> object:
    """What a safetensors file or a file of torch.save holds, memory-mapped. Its content says which, not its name.

    may_be_old: also read what torch wrote before 1.6, a bare pickle, which cannot be mapped.
    Raises pickle.UnpicklingError for objects other than tensors, and DAMAGED.
    """
    if file_kind(path) == SAFETENSORS:
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=not may_be_old or zipfile.is_zipfile(path))


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def state_on_meta(architecture: Architecture) -> dict[str, Tensor]:
    """The architecture's tensors, without memory for their values. Raises ImportError when its library is missing."""
    state: dict[str, Tensor] = build_on_meta(architecture).state_dict()
    return state


def build_on_meta(architecture: Architecture) -> Any:
    """Build it without memory for its values, so that nothing is initialised only to be replaced by weights."""
    with torch.device("meta"), _NothingInitialised():
        return architecture()


class _NothingInitialised(TorchFunctionMode):
    """On "meta" torch imports its compiler to compute initial values, which takes seconds, and there are none.

    So initialisers do nothing, and the small table that SAM draws and multiplies is drawn on the CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return given.get("tensor", args[0] if args else None)
        return func(*args, **given, **({"device": "cpu"} if func is torch.randn else {}))


def fitting_model(found: Shapes, known: Mapping[str, Architecture]) -> str | None:
    """The known model whose names and shapes are exactly these. None if there is none."""
    for name, architecture in known.items():
        try:
            shapes = shapes_of(state_on_meta(architecture))
        except ImportError:
            continue  # its library is not installed here
        if shapes == found:
            return name
    return None


def differences(expected: Shapes, found: Shapes, *, shown: int) -> str:
    """What is missing, unexpected and of another shape. shown: how many names of each."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} {found[name]}, not {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    parts = [
        f"{len(names)} {what} ({some(names, shown)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    return ", ".join(parts)


def some(names: Iterable[str], shown: int = 3) -> str:
    listed = [name[:200] for name in names]
    return ", ".join(listed[:shown]) + (", …" if len(listed) > shown else "")
