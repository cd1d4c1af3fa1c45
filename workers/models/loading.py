"""From a registry entry to a loaded `Model`, kept by name and sha256. Called in a worker's child process only."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Sequence
from typing import cast

from workers.models.files import weights_sha256
from workers.models.spec import MissingLibraryError, Model, ModelSpec
from workers.params import ParamError

ONNX_LIBRARIES = ("onnx", "onnxruntime")  # needed by decoder=onnx
_loaded: dict[tuple[str, str, str], Model] = {}
_loading = threading.Lock()


def missing_libraries(libraries: Sequence[str]) -> list[str]:
    """Those of these libraries that are not installed. None is imported."""
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def require_libraries(what: str, libraries: Sequence[str]) -> None:
    """Raise MissingLibraryError when one of these libraries is not installed. what: who needs them."""
    if missing := missing_libraries(libraries):
        raise MissingLibraryError(
            f'{what} needs {" and ".join(missing)}, not installed here: run `pip install "maskfleet[models]"`'
        )


def require_decoder(spec: ModelSpec, decoder: str) -> None:
    """Raise ParamError when this model cannot use this decoder."""
    if decoder not in spec.decoders:
        raise ParamError(f"decoder={decoder}: {spec.name} takes {' or '.join(spec.decoders)} only")


def count_loaded() -> int:
    """How many models this process holds: those of the jobs that it worked for."""
    return len(_loaded)


def load_model(spec: ModelSpec, device: str) -> Model:
    """The model on this device ("cpu", "cuda", "cuda:1"), loaded at the first call and kept. Thread-safe.

    Raises WeightsError when the file is absent, damaged or another model's; MissingLibraryError when its libraries are
    not installed; torch.cuda.OutOfMemoryError when it does not fit on the device.
    """
    require_libraries(spec.name, spec.libraries)
    key = (spec.name, weights_sha256(spec), device)
    with _loading:
        if key not in _loaded:
            module, function = spec.loader.split(":")
            _loaded[key] = cast(Model, getattr(importlib.import_module(module), function)(spec, device))
        return _loaded[key]
