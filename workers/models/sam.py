"""Segment Anything as a `Model`: the official vit_h, vit_l and vit_b checkpoints, SAM-HQ, MobileSAM, our sam_nano.

The architectures are segment_anything's own modules. MobileSAM's image encoder is timm's. A checkpoint is loaded only
when every name and shape fits and its sha256 is the pinned one. So a model_version always means the same weights.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from segment_anything.build_sam import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from segment_anything.modeling import Sam
from torch import Tensor

from workers.engine import automatic
from workers.engine.promptable import Promptable
from workers.engine.prompted import prompted_masks
from workers.images.pixels import RgbImage
from workers.masks import Mask
from workers.models.files import weights_path
from workers.models.fused_attention import fuse_attention
from workers.models.mobile_sam import build_mobile_sam
from workers.models.nano import build_sam_nano
from workers.models.sam_hq import build_sam_hq_vit_b, build_sam_hq_vit_h, build_sam_hq_vit_l
from workers.models.spec import Model, ModelSpec, WeightsError
from workers.models.state_dicts import (
    DAMAGED,
    Architecture,
    Shapes,
    build_on_meta,
    differences,
    fitting_model,
    read_tensors,
    shapes_of,
    some,
)
from workers.models.weights import Verified, WeightsState, remedy, verify
from workers.params import AutomaticParams, PromptParams
from workers.prompts import Prompt

ARCHITECTURES: dict[str, Architecture] = {
    "sam_vit_h": build_sam_vit_h,
    "sam_vit_l": build_sam_vit_l,
    "sam_vit_b": build_sam_vit_b,
    "mobile_sam": build_mobile_sam,
    "sam_hq_vit_h": build_sam_hq_vit_h,
    "sam_hq_vit_l": build_sam_hq_vit_l,
    "sam_hq_vit_b": build_sam_hq_vit_b,
    "sam_nano": build_sam_nano,
}


class SamModel:
    """One loaded Sam or another Promptable. Stateless: every call gets its image, and threads may share it.

    spec: the model that owns the weights. decoder=onnx needs it.
    """

    def __init__(self, sam: Sam | Promptable, spec: ModelSpec | None = None) -> None:
        self.sam = sam
        self.spec = spec

    def embed(self, images: Sequence[RgbImage], *, fast: bool = False) -> list[Any]:
        """Encode (H, W, 3) uint8 RGB images of any sizes in one encoder pass: one embedding for each, on the device.

        fast: in bfloat16. May raise torch.cuda.OutOfMemoryError; fewer images need less memory.
        """
        return automatic.embed(self.sam, images, fast=fast)

    def automatic(self, image: RgbImage, embedding: Any, params: AutomaticParams) -> list[Mask]:
        """Every object of one image that passes `params`, in the frame of `image`. embedding: of this image.

        Crop layers (params.crop_n_layers) run the encoder again. May raise torch.cuda.OutOfMemoryError.
        """
        return automatic.automatic_masks(self._decoded_by(params.decoder), image, params, embedding=embedding)

    def prompted(
        self, image: RgbImage, embedding: Any, prompts: Sequence[Prompt], params: PromptParams
    ) -> list[list[Mask]]:
        """One mask for each prompt, or three with multimask=all, in the frame of `image`. embedding: of this image.

        May raise torch.cuda.OutOfMemoryError.
        """
        sam = self._decoded_by(params.decoder)
        return prompted_masks(sam, embedding, prompts, params, size_hw=(image.shape[0], image.shape[1]))

    def _decoded_by(self, decoder: str) -> Sam | Promptable:
        return self._with_onnx if decoder == "onnx" else self.sam

    @cached_property
    def _with_onnx(self) -> Sam:
        from workers.models.onnx_decoder import with_onnx_decoder

        if self.spec is None or not isinstance(self.sam, Sam):
            raise ValueError("decoder=onnx: only a Sam with its spec has an exported decoder")
        return with_onnx_decoder(self.sam, self.spec)


def load(spec: ModelSpec, device: str) -> Model:
    """The named model with its weights on `device`. Raises what `load_sam` raises."""
    return SamModel(load_sam(spec, ARCHITECTURES[spec.architecture], device), spec)


def load_sam(
    spec: ModelSpec,
    architecture: Architecture,
    device: str,
    *,
    known: Mapping[str, Architecture] = ARCHITECTURES,
    unpack: Callable[[Any], Any] = lambda checkpoint: checkpoint,
    without: tuple[str, ...] = (),
) -> Any:
    """Build `architecture` with the weights of spec's file: float32, frozen, in evaluation mode, on `device`.

    known: other models' architectures. When the file has the weights of one of them, the error names it. unpack: gets
    the file's content and returns its tensors by name; other content it returns unchanged. without: the prefixes of
    tensors that `architecture` leaves out. They are not read into memory.

    Raises WeightsError when the file is absent, unreadable, truncated, another model's or not the pinned one. The error
    names the file, what it is, and the command that fixes it. Raises torch.cuda.OutOfMemoryError when it does not fit.
    """
    verified = verify(spec)
    if verified.state is WeightsState.OTHER_MODEL:
        raise WeightsError(f"{verified.path}: {verified.found}, expected the weights of {spec.name}; {remedy(spec)}")
    state = _read_weights(spec, verified, unpack)
    sam = build_on_meta(architecture)
    _require_same_shapes(
        spec, expected=shapes_of(sam.state_dict()), found=shapes_of(state), known=known, without=without
    )
    if not verified.ok:
        raise WeightsError(f"{verified.path}: fits {spec.name}, but is {verified.found}; {remedy(spec)}")
    # Copied out of the mapped file, so that the file may be replaced while the model is used.
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(without)}
    weights = {name: tensor.to(device, _dtype(tensor), copy=True) for name, tensor in kept.items()}
    sam.load_state_dict(weights, strict=True, assign=True)
    if torch.device(device).type == "cuda":
        fuse_attention(sam)
    return sam.to(device).eval().requires_grad_(False)


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _read_weights(spec: ModelSpec, verified: Verified, unpack: Callable[[Any], Any]) -> dict[str, Tensor]:
    """Read the file's tensors by name, memory-mapped. No code in the file is run."""
    path = verified.path
    if verified.state is WeightsState.ABSENT:
        raise WeightsError(f"{spec.name}: no weights at {path}; {remedy(spec)}")
    try:
        state = unpack(read_tensors(path))
    except pickle.UnpicklingError as error:
        found = "holds pickled objects other than tensors, which are not loaded because they could run code"
        raise WeightsError(f"{path}: {found}; {remedy(spec)}") from error
    except DAMAGED as error:
        found = f"cannot be read ({error})" if verified.ok else verified.found
        raise WeightsError(f"{path}: {found}; {remedy(spec)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        held = f"entries {some(map(str, state))}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise WeightsError(f"{path}: holds {held}, expected the tensors of {spec.name} by name; {remedy(spec)}")
    return state


def _require_same_shapes(
    spec: ModelSpec, *, expected: Shapes, found: Shapes, known: Mapping[str, Architecture], without: tuple[str, ...]
) -> None:
    compared = {name: shape for name, shape in found.items() if not name.startswith(without)}
    if compared == expected:
        return
    other = fitting_model(found, known)
    said = (
        f"holds the weights of {other}"
        if other is not None
        else f"holds another model's weights: {differences(expected, compared, shown=3)}"
    )
    raise WeightsError(f"{weights_path(spec)}: {said}, expected the weights of {spec.name}; {remedy(spec)}")
