"""SAM 2.1 for single images (Ravi et al., arXiv:2408.00714): transformers' Sam2Model with the weights of Meta.

The memory of earlier video frames is left out. This architecture has no modules for it, and its tensors in the file are
skipped by name. The state dict has the authors' names and shapes, so `sam2.1_hiera_*.pt` is compared like every other
checkpoint. `authors_name` converts transformers' names to the authors' names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize, resize

from workers.engine.promptable import Decode, Hw, MaskLogits, Points, half_precision
from workers.engine.upsampling import Upsampling
from workers.images.pixels import RgbImage
from workers.models.sam import ARCHITECTURES, SamModel, load_sam
from workers.models.spec import Model, ModelSpec
from workers.models.state_dicts import Architecture

# RGB, 0..1: ImageNet's values, as in the authors' sam2/utils/transforms.py.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

# Prompts decoded at once on a CPU. Each is upscaled at full width and added to the encoder's finest level, which takes
# 80 MiB of buffers. On a GPU all prompts of a call are decoded at once.
AT_ONCE_ON_CPU = 4

_ENCODER_TENSORS = ("image_encoder.", "no_mem_embed")
_VIDEO_MEMORY = (
    "memory_attention.",
    "memory_encoder.",
    "maskmem_tpos_enc",
    "mask_downsample.",
    "no_mem_pos_enc",
    "no_obj_embed_spatial",
    "no_obj_ptr",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hiera:
    """The sizes of one variant: of its encoder by stage, of the (square) input, and of the decoder's input."""

    width: int
    heads: int
    blocks: tuple[int, int, int, int]
    global_blocks: tuple[int, ...]
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)
    background: int = 7
    image_px: int = 1024
    channels: int = 256


# The authors' configs/sam2.1/*.yaml, with the defaults of their Hiera.
VARIANTS = {
    "sam2.1_tiny": Hiera(width=96, heads=1, blocks=(1, 2, 7, 2), global_blocks=(5, 7, 9)),
    "sam2.1_small": Hiera(width=96, heads=1, blocks=(1, 2, 11, 2), global_blocks=(7, 10, 13)),
    "sam2.1_base_plus": Hiera(width=112, heads=2, blocks=(2, 3, 16, 3), global_blocks=(12, 16, 20), background=14),
    "sam2.1_large": Hiera(width=144, heads=2, blocks=(2, 6, 36, 4), global_blocks=(23, 33, 43), windows=(8, 4, 16, 8)),
}


def load(spec: ModelSpec, device: str) -> Model:
    """The named model with its weights on `device`. Raises what `load_sam` raises."""
    return load_variant(spec, VARIANTS[spec.architecture], device)


def load_variant(spec: ModelSpec, hiera: Hiera, device: str) -> Model:
    """A SAM 2.1 of these sizes with the weights of spec's file."""
    return SamModel(load_sam(spec, partial(Sam2, hiera), device, known=known_architectures(), unpack=without_memory))


def load_decoder_variant(spec: ModelSpec, hiera: Hiera, device: str) -> Sam2:
    """The same without its image encoder: it decodes embeddings and makes none."""
    architecture = partial(Sam2, hiera, has_encoder=False)
    return cast(
        Sam2,
        load_sam(
            spec, architecture, device, known=known_architectures(), unpack=without_memory, without=_ENCODER_TENSORS
        ),
    )


def known_architectures() -> dict[str, Architecture]:
    """Every model of the registry that is a file of tensors, by name."""
    return ARCHITECTURES | {name: partial(Sam2, sizes) for name, sizes in VARIANTS.items()}


def without_memory(checkpoint: Any) -> Any:
    """The tensors of an official checkpoint that single images need. Other content is returned unchanged."""
    if not isinstance(checkpoint, dict) or list(checkpoint) != ["model"] or not isinstance(checkpoint["model"], dict):
        return checkpoint
    return image_tensors(checkpoint["model"])


def image_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a SAM 2.1 without those that only videos need. Other models have none of these."""
    return {name: tensor for name, tensor in state.items() if not str(name).startswith(_VIDEO_MEMORY)}


class Sam2(nn.Module):
    """A `Promptable`. An embedding is three levels of the image's features, finest first: (1, C, h, w) float32 each."""

    mask_threshold = 0.0

    def __init__(self, hiera: Hiera, *, has_encoder: bool = True) -> None:
        """Random weights, in training mode. Raises ImportError when transformers is not installed."""
        super().__init__()
        self.image_px = hiera.image_px
        self.model = _build(hiera, has_encoder=has_encoder)
        self.register_state_dict_post_hook(_to_authors_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_to_own_names)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def low_hw(self) -> Hw:
        low_hw: Hw = self.model.prompt_encoder.mask_input_size
        return low_hw

    def embed(self, images: Sequence[RgbImage], *, fast: bool) -> list[list[Tensor]]:
        """Resize to a square and normalise like transformers' Sam2ImageProcessor, then encode.

        That rounds the resized pixels to whole grey levels. The authors' own transform keeps the fractions.
        """
        size = [self.image_px, self.image_px]
        squares = [resize(torch.tensor(image).permute(2, 0, 1), size, antialias=True) for image in images]
        pixels = normalize(torch.stack(squares).to(self.device) / 255, PIXEL_MEAN, PIXEL_STD)
        with half_precision(self.device, is_wanted=fast):
            levels = self.model.get_image_embeddings(pixels)
        return [[level[number : number + 1].float() for level in levels] for number in range(len(images))]

    def input_hw(self, size_hw: Hw) -> Hw:
        """Always the square."""
        return self.image_px, self.image_px

    def upsampling(self, size_hw: Hw) -> Upsampling:
        """From the logits to the image in one step. The square in between has the logits' size and changes nothing."""
        return Upsampling(low_hw=self.low_hw, mid=self.low_hw[0], inside_hw=self.low_hw, frame_hw=size_hw)

    def encode_prompts(self, points: Points | None, boxes: Tensor | None) -> Tensor:
        coords, labels = points if points is not None else (None, None)
        with half_precision(self.device, is_wanted=False):  # bfloat16 has only 256 different positions along a side
            sparse: Tensor = self.model.prompt_encoder(
                input_points=None if coords is None else coords[None],
                input_labels=None if labels is None else labels[None],
                input_boxes=None if boxes is None else boxes[None],
                input_masks=None,
            )[0]
        return sparse[0]

    def decoder(self, embedding: list[Tensor], mask_input: Tensor | None = None) -> Decode:
        """Make the decoder of this image's prompts.

        The single mask is the first token's if that is stable, otherwise the best of the other three. This is the
        authors' dynamic_multimask_via_stability.
        """
        with half_precision(self.device, is_wanted=False):
            position = self.model.get_image_wide_positional_embeddings()
            _, dense = self.model.prompt_encoder(None, None, None, mask_input)

        def decode(sparse: Tensor, outputs: slice) -> Iterator[tuple[int, Tensor, MaskLogits]]:
            step = len(sparse) if sparse.is_cuda else AT_ONCE_ON_CPU
            for first in range(0, len(sparse), step):
                logits, iou, _, _ = self.model.mask_decoder(
                    image_embeddings=embedding[-1],
                    image_positional_embeddings=position,
                    sparse_prompt_embeddings=sparse[None, first : first + step],
                    dense_prompt_embeddings=dense,
                    multimask_output=outputs.start > 0,
                    high_resolution_features=embedding[:-1],
                )
                yield first, iou[0], partial(_pick, logits[0])

        return decode


def _pick(logits: Tensor, wanted: Tensor | None, used_hw: Hw) -> tuple[Tensor, Tensor]:
    if wanted is None:
        return torch.arange(len(logits)), logits[..., : used_hw[0], : used_hw[1]]
    numbers = wanted.nonzero()[:, 0]
    return numbers, logits[numbers.to(logits.device), :, : used_hw[0], : used_hw[1]]


class _Decoding(nn.Module):
    """The parts of Sam2Model that decode, with its names."""

    def __init__(self, config: Any) -> None:
        from transformers.models.sam2 import modeling_sam2 as sam2

        super().__init__()
        config.mask_decoder_config._attn_implementation = "sdpa"  # Sam2Model's own choice
        self.shared_image_embedding = sam2.Sam2PositionalEmbedding(config.prompt_encoder_config)
        self.prompt_encoder = sam2.Sam2PromptEncoder(config.prompt_encoder_config)
        self.mask_decoder = sam2.Sam2MaskDecoder(config.mask_decoder_config)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def get_image_wide_positional_embeddings(self) -> Tensor:
        from transformers import Sam2Model

        positions: Tensor = Sam2Model.get_image_wide_positional_embeddings(self)
        return positions


def _build(hiera: Hiera, *, has_encoder: bool) -> Any:
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig

    widths = [hiera.width * 2**stage for stage in range(4)]
    backbone = Sam2HieraDetConfig(
        hidden_size=hiera.width,
        num_attention_heads=hiera.heads,
        image_size=[hiera.image_px, hiera.image_px],
        window_positional_embedding_background_size=[hiera.background, hiera.background],
        blocks_per_stage=list(hiera.blocks),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[hiera.heads * 2**stage for stage in range(4)],
        window_size_per_stage=list(hiera.windows),
        global_attention_blocks=list(hiera.global_blocks),
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[hiera.image_px // stride] * 2 for stride in (4, 8, 16)],
        fpn_hidden_size=hiera.channels,
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": hiera.channels, "image_size": hiera.image_px},
        mask_decoder_config={"hidden_size": hiera.channels},
    )
    model = Sam2Model(config) if has_encoder else _Decoding(config)
    head = model.mask_decoder.iou_prediction_head
    head.forward = partial(_in_float32, head.forward)
    return model


def _in_float32(forward: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    with half_precision(tokens.device, is_wanted=False):
        return forward(tokens.float())


# Names of weights, transformers' first. They are applied one after the other.
_RENAMINGS = tuple(
    (re.compile(own), authors)
    for own, authors in (
        (r"^model\.", ""),
        (r"^no_memory_embedding$", "no_mem_embed"),
        (r"^(shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
         "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
        (r"^prompt_encoder\.", "sam_prompt_encoder."),
        (r"^mask_decoder\.", "sam_mask_decoder."),
        (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
        (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
        (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
        (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
        (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
        (r"\.upscale_conv1\.", ".output_upscaling.0."),
        (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
        (r"\.upscale_conv2\.", ".output_upscaling.3."),
        (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
        (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
        (r"^vision_encoder\.neck\.convs\.(\d)\.", r"image_encoder.neck.convs.\1.conv."),
        (r"\.o_proj\.", ".out_proj."),
        (r"\.layer_norm", ".norm"),
        # the transformers have two layers, the heads have three
        (r"\.mlp\.proj_in\.", ".mlp.layers.0."),
        (r"\.mlp\.proj_out\.", ".mlp.layers.1."),
        (r"(_mlps\.\d|_head)\.layers\.0\.", r"\1.layers.1."),
        (r"\.proj_in\.", ".layers.0."),
        (r"\.proj_out\.", ".layers.2."),
    )
)  # fmt: skip
# transformers has one tensor of four rows; the authors have four tensors of one row.
_POINTS = "sam_prompt_encoder.point_embed.weight"
_POINT = "sam_prompt_encoder.point_embeddings.{}.weight"


def authors_name(name: str) -> str:
    """The name that SAM 2's authors gave a tensor of `Sam2`."""
    for own, authors in _RENAMINGS:
        name = own.sub(authors, name)
    return name


def _to_authors_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    renamed = {authors_name(name): value for name, value in state.items()}
    for row, value in enumerate(renamed.pop(_POINTS).split(1)):
        renamed[_POINT.format(row)] = value
    state.clear()
    state.update(renamed)


def _to_own_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    given: Mapping[str, Any] = {**state, _POINTS: torch.cat([state[_POINT.format(row)] for row in range(4)])}
    state.clear()
    state.update({name: given[authors_name(name)] for name, _ in _tensors(module)})


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
