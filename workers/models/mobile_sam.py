"""MobileSAM: Segment Anything with TinyViT-5M as its image encoder (Zhang et al. 2023, arXiv:2306.14289).

The encoder is timm's TinyViT with two changes: the last downsampling keeps the grid of 64 x 64, and SAM's neck replaces
the classifier. Its state dict has the authors' names, and also the unused classifier of the pretraining. So
`mobile_sam.pt` is read, compared and named like every other checkpoint of SAM.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

IMAGE_SIZE_PX = 1024
EMBEDDING_SIZE = 64
TRANSFORMER_DIM = 256
STAGE_DIMS = (64, 128, 160, 320)


def build_mobile_sam(image_encoder: nn.Module | None = None) -> Sam:
    """The architecture with random weights, in training mode, float32. Raises ImportError when timm is missing.

    image_encoder: instead of TinyViT. All other parts are those of SAM's own vit_b, vit_l and vit_h.
    """
    return Sam(
        image_encoder=image_encoder or TinyViTEncoder(),
        prompt_encoder=PromptEncoder(
            embed_dim=TRANSFORMER_DIM,
            image_embedding_size=(EMBEDDING_SIZE, EMBEDDING_SIZE),
            input_image_size=(IMAGE_SIZE_PX, IMAGE_SIZE_PX),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=TRANSFORMER_DIM, mlp_dim=2048, num_heads=8),
            transformer_dim=TRANSFORMER_DIM,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )


class TinyViTEncoder(nn.Module):
    """From normalised pixels (n, 3, 1024, 1024) to embeddings (n, 256, 64, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = IMAGE_SIZE_PX
        tiny_vit = _build_tiny_vit()
        # TinyViT for classification would halve the grid once more; MobileSAM keeps SAM's 64 x 64.
        tiny_vit.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.patch_embed, self.stages = tiny_vit.patch_embed, tiny_vit.stages
        self.neck = nn.Sequential(
            nn.Conv2d(STAGE_DIMS[-1], TRANSFORMER_DIM, kernel_size=1, bias=False),
            LayerNorm2d(TRANSFORMER_DIM),
            nn.Conv2d(TRANSFORMER_DIM, TRANSFORMER_DIM, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(TRANSFORMER_DIM),
        )
        # TinyViT's pretraining used these. They are in the file, and are never called.
        self.norm_head, self.head = nn.LayerNorm(STAGE_DIMS[-1]), nn.Linear(STAGE_DIMS[-1], 1000)
        self.register_state_dict_post_hook(_to_authors_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_to_own_names)  # type: ignore[no-untyped-call]

    def forward(self, pixels: Tensor) -> Tensor:
        embedding: Tensor = self.neck(self.stages(self.patch_embed(pixels)))
        return embedding


def _build_tiny_vit() -> Any:
    from timm.models.tiny_vit import TinyVit

    # Not by its name in timm's registry: the authors' own package takes that name when it is imported. Always on the
    # CPU: no checkpoint holds the tables of relative positions, so a model built on "meta" would not have them.
    with torch.device("cpu"):
        return TinyVit(
            num_classes=0,
            embed_dims=STAGE_DIMS,
            depths=(2, 2, 6, 2),
            num_heads=(2, 4, 5, 10),
            window_sizes=(7, 7, 14, 7),
            drop_path_rate=0.0,
        )


# Names of weights, timm's first. The downsampling is at the end of the authors' layers; timm has it at the start of the
# next stage.
_PREFIXES = (
    ("patch_embed.conv1.", "patch_embed.seq.0."),
    ("patch_embed.conv2.", "patch_embed.seq.2."),
    ("stages.1.downsample.", "layers.0.downsample."),
    ("stages.2.downsample.", "layers.1.downsample."),
    ("stages.3.downsample.", "layers.2.downsample."),
    ("stages.", "layers."),
)


def authors_name(name: str) -> str:
    """The name that MobileSAM's authors gave a weight of the encoder. Names outside TinyViT stay."""
    for own, authors in _PREFIXES:
        if name.startswith(own):
            return re.sub(r"\.conv\.weight$", ".c.weight", authors + name.removeprefix(own))
    return name


def _to_authors_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    _rename(state, prefix, {name: authors_name(name) for name in _names(module)})


def _to_own_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    _rename(state, prefix, {authors_name(name): name for name in _names(module)})


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()] + [name for name, _ in module.named_buffers()]


def _rename(state: dict[str, Any], prefix: str, names: dict[str, str]) -> None:
    """Rename the entries of one module in place, and keep their order."""
    full_names = {prefix + name: prefix + renamed for name, renamed in names.items()}
    renamed = [(full_names.get(name, name), value) for name, value in state.items()]
    state.clear()
    state.update(renamed)
