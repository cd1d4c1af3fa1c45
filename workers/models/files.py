"""Where a model's weights are, whether they are present, and the `model_version` that is computed from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from db.settings import settings
from workers.models.folders import checkpoint_files, has_weights, identity
from workers.models.spec import ModelSpec, WeightsError
from workers.paths import own_path


def weights_path(spec: ModelSpec) -> Path:
    """Where this model's weights are, or will be after a pull. Nothing is read."""
    if spec.url is None and spec.hub is None and not spec.is_own:
        return Path(__file__).with_name(spec.weights_file)
    return weights_dir() / spec.weights_file


def onnx_path(spec: ModelSpec) -> Path:
    """Where `--decoder onnx` expects this model's decoder: in the weights folder, under the weights' own name."""
    return weights_dir() / f"{spec.name}.{weights_sha256(spec)[:8]}.decoder.onnx"


def weights_dir() -> Path:
    """The folder of pulled weights: MASKFLEET_WEIGHTS_DIR, else maskfleet/weights in the user's cache folder."""
    configured = settings().weights_dir
    if configured is not None:
        return own_path(configured)
    # By the XDG rules a relative or empty XDG_CACHE_HOME is ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = xdg if xdg.is_absolute() else Path.home() / ".cache"
    return cache / "maskfleet" / "weights"


def is_present(spec: ModelSpec) -> bool:
    """Whether a file exists at the weights' path. `weights.verify` and `load` check that it is the right one."""
    if spec.hub is not None:
        return has_weights(weights_path(spec))
    return weights_path(spec).is_file()


def weights_sha256(spec: ModelSpec) -> str:
    """The sha256 that identifies the model's weights: the pinned one, or for a folder the one of its content.

    Of a decoder with a base it follows from both files. Raises WeightsError when the folder is absent.
    """
    if spec.base_sha256 is not None:
        return hashlib.sha256(f"{spec.base_sha256} {spec.sha256}".encode()).hexdigest()
    if spec.hub is None:
        return spec.sha256
    folder = weights_path(spec)
    if not has_weights(folder):
        raise WeightsError(f"{spec.name}: no weights at {folder}; run `maskfleet models pull {spec.name}`")
    return identity(checkpoint_files(folder))


def encoder_of(spec: ModelSpec) -> tuple[str, str]:
    """The name and the weights' sha256 of the model that has this model's image encoder: its base, else itself.

    They identify an embedding. So a tuned decoder reads the embeddings of its base. Raises what weights_sha256 raises.
    """
    if spec.base is not None and spec.base_sha256 is not None:
        return spec.base, spec.base_sha256
    return spec.name, weights_sha256(spec)


def require_same_weights(spec: ModelSpec, version: str) -> None:
    """Raise WeightsError when the job of this model_version was submitted with other weights of the same name."""
    if spec.hub is None and not spec.is_own:
        return
    found = weights_sha256(spec)[:8]
    asked = version.removeprefix(f"{spec.name}@").partition("+")[0]
    if found != asked:
        raise WeightsError(
            f"{spec.name}: {weights_path(spec)} is {found}, but the job was submitted with {asked}; put the same files "
            "there, or submit again"
        )


def model_version(spec: ModelSpec, asked: Mapping[str, Any]) -> str:
    """`<model>@<first 8 of the weights' sha256>+<first 8 of the sha256 of asked>`.

    Two versions are equal exactly when their answers are. asked: JSON-safe; the mode, the prompts and the parameters,
    with spec.defaults filled in. So a release with other defaults gives another version. The order of its keys does not
    matter. Raises ValueError for NaN or infinity, and TypeError for values that JSON cannot hold.
    """
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{spec.name}@{weights_sha256(spec)[:8]}+{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"
