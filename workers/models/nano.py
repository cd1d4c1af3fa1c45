"""sam_nano: our own small SAM, shipped in the package, so that the demo and the tests need no download.

It consists of segment_anything's own modules, so it runs through the same code of the pipeline as vit_b. It was trained
by `workers.training.train_nano`, on drawn scenes only. It shows that the pipeline works, not how good SAM is.

The shipped weights were trained in three parts: seed 1, 4,204 steps in 107 minutes on one busy core (2026-11-20); then
seed 7 with a peak rate of 8e-4, 3,420 steps in 90 minutes; then the last fit of the head (2026-11-21). The scenes and
the loss were changed during the training. So today's script gives a similar model, not the same bytes.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from workers.models.registry import MODELS

# 256 px in patches of 8 give a 32 x 32 embedding and a 128 x 128 mask grid, like a 512 px ViT with patches of 16. But a
# patch has 192 values instead of 768, which fits into a model this narrow.
IMAGE_SIZE_PX = 256
PATCH_SIZE_PX = 8
EMBEDDING_SIZE = IMAGE_SIZE_PX // PATCH_SIZE_PX
TRANSFORMER_DIM = 128

# RGB, 0..255: SAM's own.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

WEIGHTS_PATH = Path(__file__).with_name("sam_nano.safetensors")
WEIGHTS_SHA256 = MODELS["sam_nano"].sha256


def build_sam_nano(image_encoder: torch.nn.Module | None = None) -> Sam:
    """The architecture with random weights, in training mode, float32, on the CPU.

    image_encoder: instead of its own.
    """
    return Sam(
        image_encoder=image_encoder or _build_image_encoder(),
        prompt_encoder=PromptEncoder(
            embed_dim=TRANSFORMER_DIM,
            image_embedding_size=(EMBEDDING_SIZE, EMBEDDING_SIZE),
            input_image_size=(IMAGE_SIZE_PX, IMAGE_SIZE_PX),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=TRANSFORMER_DIM, mlp_dim=512, num_heads=4),
            transformer_dim=TRANSFORMER_DIM,
            iou_head_depth=3,
            iou_head_hidden_dim=128,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )


def load_sam_nano(device: str, weights: Path = WEIGHTS_PATH) -> Sam:
    """The model with its weights in float32, in evaluation mode.

    Raises ValueError when the shipped file does not have the sha256 WEIGHTS_SHA256.
    """
    content = weights.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if weights == WEIGHTS_PATH and found != WEIGHTS_SHA256:
        raise ValueError(f"{weights}: sha256 {found}, expected {WEIGHTS_SHA256}; install maskfleet again")
    model = build_sam_nano()
    model.load_state_dict({name: value.float() for name, value in load_safetensors(content).items()})
    return model.to(device).eval()


def _build_image_encoder() -> ImageEncoderViT:
    return ImageEncoderViT(
        img_size=IMAGE_SIZE_PX,
        patch_size=PATCH_SIZE_PX,
        embed_dim=160,
        depth=6,
        num_heads=5,
        mlp_ratio=4,
        out_chans=TRANSFORMER_DIM,
        qkv_bias=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        # No relative positions: their tables would fix the weights to one grid size, and training crops the grid.
        use_rel_pos=False,
        window_size=8,
        global_attn_indexes=(1, 3, 5),
    )
