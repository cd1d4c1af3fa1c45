"""A model's decoder alone: it answers prompts from a kept embedding, and its image encoder is never built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from segment_anything.modeling import Sam
from torch import Tensor, nn

from workers.engine.promptable import Promptable
from workers.engine.sam import promptable
from workers.models.loading import require_libraries
from workers.models.mobile_sam import IMAGE_SIZE_PX, build_mobile_sam
from workers.models.nano import IMAGE_SIZE_PX as NANO_IMAGE_SIZE_PX
from workers.models.nano import build_sam_nano
from workers.models.sam import load_sam
from workers.models.sam_hq import build_around
from workers.models.spec import ModelError, ModelSpec
from workers.models.tuned import load_tuned

_ENCODER_TENSORS = ("image_encoder.",)


class NoEncoder(nn.Module):
    """Stands where an image encoder would. It knows the size of the encoder's input, and encodes nothing."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = img_size

    def forward(self, pixels: Tensor) -> Tensor:
        raise ModelError("this model was loaded without its image encoder")


def _build_sam() -> Sam:
    """The decoder of vit_h, vit_l, vit_b and MobileSAM: they differ only in their encoders."""
    return build_mobile_sam(NoEncoder(IMAGE_SIZE_PX))


def _build_nano() -> Sam:
    return build_sam_nano(NoEncoder(NANO_IMAGE_SIZE_PX))


def _build_hq(width: int) -> Sam:
    return build_around(NoEncoder(IMAGE_SIZE_PX), width=width)


DECODERS: dict[str, Callable[[], Sam]] = {
    "sam_vit_h": _build_sam,
    "sam_vit_l": _build_sam,
    "sam_vit_b": _build_sam,
    "mobile_sam": _build_sam,
    "sam_hq_vit_h": partial(_build_hq, 1280),
    "sam_hq_vit_l": partial(_build_hq, 1024),
    "sam_hq_vit_b": partial(_build_hq, 768),
    "sam_nano": _build_nano,
}


def load_decoder(spec: ModelSpec, device: str) -> Promptable:
    """The decoder of the named model with its weights, on `device`. Its `embed` raises.

    Raises ModelError for a model that takes no points, otherwise what `load_model` raises. The whole file is read once
    to check it, but only the decoder's weights stay in memory.
    """
    if spec.family == "sam2.1":
        require_libraries(spec.name, spec.libraries)
        from workers.models.sam2 import VARIANTS, load_decoder_variant

        return load_decoder_variant(spec, VARIANTS[spec.architecture], device)
    if spec.architecture not in DECODERS:
        raise ModelError(f"{spec.name} takes {' and '.join(spec.prompts)}, no points: it answers no clicks")
    return load_sam_decoder(spec, DECODERS[spec.architecture], device)


def load_sam_decoder(spec: ModelSpec, architecture: Callable[[], Sam], device: str) -> Promptable:
    """The same for a Sam that `architecture` builds without its encoder."""
    load = load_sam if spec.base is None else load_tuned
    return promptable(load(spec, architecture, device, without=_ENCODER_TENSORS), fold_from_dim=0)
