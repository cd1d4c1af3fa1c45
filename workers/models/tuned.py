"""Models whose file holds a tuned mask decoder alone. All other tensors are those of the base that the file names.

The image encoder is the base's, so kept embeddings of the base are this model's too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.models.files import weights_path, weights_sha256
from workers.models.registry import find_model
from workers.models.sam import ARCHITECTURES, SamModel, load_sam
from workers.models.spec import Model, ModelError, ModelSpec, WeightsError
from workers.models.state_dicts import Architecture
from workers.models.weights import verify

# Their decoder is segment_anything's MaskDecoder. SAM-HQ's and SAM 2.1's have other parts, which nothing here trains.
TUNABLE = ("sam_vit_h", "sam_vit_l", "sam_vit_b", "mobile_sam", "sam_nano")

_PREFIX = "mask_decoder."


def require_tunable(spec: ModelSpec) -> None:
    """Raise ModelError for a model whose decoder cannot be tuned."""
    if spec.architecture not in TUNABLE:
        raise ModelError(
            f"{spec.name}: the decoder of {spec.family} cannot be tuned; these can: {', '.join(TUNABLE)}, "
            "and models of one's own that are built as one of them"
        )


def load(spec: ModelSpec, device: str) -> Model:
    """The tuned model on `device`. Raises what `load_tuned` raises."""
    return SamModel(load_tuned(spec, ARCHITECTURES[spec.architecture], device), spec)


def load_tuned(spec: ModelSpec, architecture: Architecture, device: str, *, without: tuple[str, ...] = ()) -> Any:
    """The base, with the decoder of spec's file in place of its own. The arguments are those of `load_sam`.

    Raises WeightsError when the base or the decoder is absent, damaged, not the one that is meant or does not fit.
    """
    require_tunable(spec)
    sam = load_sam(base_of(spec), architecture, device, without=without)
    tensors = read_decoder(spec)
    expected = {name: value.shape for name, value in sam.mask_decoder.state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        differ = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise WeightsError(
            f"{weights_path(spec)}: not a decoder of {spec.architecture}: {len(differ)} tensors differ, "
            f"such as {', '.join(differ[:3])}; tune or add it again"
        )
    weights = {name: value.to(device, torch.float32) for name, value in tensors.items()}
    sam.mask_decoder.load_state_dict(weights, strict=True, assign=True)
    sam.mask_decoder.eval().requires_grad_(False)
    return sam


def base_of(spec: ModelSpec) -> ModelSpec:
    """The base of a tuned model. Raises WeightsError when this machine knows another model of that name."""
    assert spec.base is not None
    base = find_model(spec.base)
    if (found := weights_sha256(base)) != spec.base_sha256:
        raise WeightsError(
            f"{spec.name}: made for the {spec.base} with sha256 {spec.base_sha256}, but {spec.base} here has {found}; "
            "bring that one back, or tune again"
        )
    return base


def read_decoder(spec: ModelSpec) -> dict[str, Tensor]:
    """The decoder's tensors in spec's file, by their names inside MaskDecoder. Raises WeightsError."""
    verified = verify(spec)
    if not verified.ok:
        raise WeightsError(f"{verified.path}: {verified.found}, expected the decoder of {spec.name}")
    try:
        tensors = load_file(verified.path)
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"{verified.path}: cannot be read ({error})") from error
    return {name.removeprefix(_PREFIX): value for name, value in tensors.items()}


def write_decoder(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a decoder's tensors, named as inside MaskDecoder, in the form that `read_decoder` reads."""
    save_file({_PREFIX + name: value.float().cpu().contiguous() for name, value in tensors.items()}, path)
