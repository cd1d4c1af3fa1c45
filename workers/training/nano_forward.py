"""sam_nano's forward pass on crops and on many prompts at once, for training."""

from __future__ import annotations

import torch
from segment_anything.modeling import Sam

from workers.models.nano import (
    PATCH_SIZE_PX,
)
from workers.training.nano_data import Batch, Prompts


def encode(model: Sam, batch: Batch) -> torch.Tensor:
    """ImageEncoderViT.forward for a crop. The crop keeps its place in the positional embedding. (B, C, h, w)."""
    encoder = model.image_encoder
    x0, y0 = batch.offset_xy
    with _autocast(batch.images):
        x = encoder.patch_embed(batch.images)
        x = x + encoder.pos_embed[:, y0 : y0 + x.shape[1], x0 : x0 + x.shape[2]]
        for block in encoder.blocks:
            x = block(x)
        return torch.as_tensor(encoder.neck(x.permute(0, 3, 1, 2)))


def decode(model: Sam, batch: Batch, embeddings: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """MaskDecoder.predict_masks for P prompts on each of B images at once.

    Returns logits (B, P, 4, h, w), the single mask first, then the other three, and predicted IoU (B, P, 4) float32.
    """
    decoder, prompt_encoder = model.mask_decoder, model.prompt_encoder
    b, c, h, w = embeddings.shape
    x0, y0 = batch.offset_xy
    sparse = embed_prompts(model, batch, prompts)
    n = sparse.shape[0] // b
    place = prompt_encoder.get_dense_pe()[:, :, y0 : y0 + h, x0 : x0 + w].expand(b * n, -1, -1, -1)
    with _autocast(embeddings):
        dense = prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        if prompts.previous is not None:
            dense = prompt_encoder.mask_downscaling(prompts.previous.flatten(0, 1)[:, None])
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(b * n, -1, -1)
        source = embeddings.repeat_interleave(n, dim=0) + dense
        hidden, source = decoder.transformer(source, place, torch.cat([tokens, sparse], dim=1))
        upscaled = decoder.output_upscaling(source.transpose(1, 2).reshape(b * n, c, h, w))
        mlps = decoder.output_hypernetworks_mlps
        weights = torch.stack([mlp(hidden[:, 1 + i]) for i, mlp in enumerate(mlps)], dim=1)
        logits = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    ious = decoder.iou_prediction_head(hidden[:, 0].float())
    return logits.unflatten(0, (b, n)), ious.unflatten(0, (b, n))


def embed_prompts(model: Sam, batch: Batch, prompts: Prompts) -> torch.Tensor:
    """The tokens (B * P, N, C) of points and boxes, moved from the crop's frame to the image's. float32."""
    shift = torch.tensor(batch.offset_xy, device=batch.images.device) * PATCH_SIZE_PX
    points = None
    if prompts.points is not None and prompts.labels is not None:
        points = ((prompts.points + shift).flatten(0, 1), prompts.labels.flatten(0, 1))
    boxes = None if prompts.boxes is None else (prompts.boxes + shift.repeat(2)).flatten(0, 1)
    sparse, _ = model.prompt_encoder(points=points, boxes=boxes, masks=None)
    return torch.as_tensor(sparse)


def _autocast(like: torch.Tensor) -> torch.autocast:
    # It takes half the time on a CPU with avx512_bf16 (measured 2026-11-20). Positions and losses stay in float32.
    return torch.autocast(like.device.type, torch.bfloat16)
