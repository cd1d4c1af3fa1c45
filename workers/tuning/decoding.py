"""SAM's decoder for many prompts of several images in one pass, with gradients: MaskDecoder.predict_masks, rearranged.

Pixels stay in rows of channels, so nothing large is transposed. What depends on the image alone is computed once for
all its prompts. The same sums, so the same results but for rounding; a training step takes about half the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """n prompts of one form, in pixels of the encoder's input. images: (n,) the number of each prompt's image.

    points: (n, p, 2) x and y. labels: (n, p), 1 inside, 0 outside; 2 and 3 a box's first and last corner, -1 padding.
    previous: (n, 1, H, W) logits of a mask that the prompt refines.
    """

    images: Tensor
    points: Tensor
    labels: Tensor
    previous: Tensor | None = None


def decode(sam: Sam, embeddings: Tensor, asked: Asked, outputs: slice = slice(0, None)) -> tuple[Tensor, Tensor]:
    """embeddings: (images, C, h, w). outputs: which of the four masks: the single one first, then the other three.

    Returns logits (n, outputs, H, W) and predicted IoUs (n, outputs), float32.
    """
    decoder, count = sam.mask_decoder, len(asked.images)
    grid_hw = (embeddings.shape[-2], embeddings.shape[-1])
    with torch.no_grad():  # the prompt encoder does not learn
        sparse, dense = _encode(sam, asked)
        place = _rows(sam.prompt_encoder.get_dense_pe())
        source = _rows(embeddings + dense) if asked.previous is None else _rows(embeddings[asked.images] + dense)
    images = asked.images if asked.previous is None else None
    with torch.autocast(embeddings.device.type, torch.bfloat16, enabled=embeddings.is_cuda):
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(count, -1, -1), sparse], dim=1)
        hidden, pixels = _attend_both_ways(decoder.transformer, source, images, place, tokens)
        kernels = [mlp(hidden[:, 1 + k]) for k, mlp in list(enumerate(decoder.output_hypernetworks_mlps))[outputs]]
        logits = _draw(decoder.output_upscaling, pixels, torch.stack(kernels, dim=2), grid_hw)
    ious = decoder.iou_prediction_head(hidden[:, 0].float())[:, outputs]
    return logits.float(), ious.float()


def _rows(maps: Tensor) -> Tensor:
    """(n, C, h, w) as (n, h * w, C)."""
    return maps.flatten(2).transpose(1, 2).contiguous()


def _encode(sam: Sam, asked: Asked) -> tuple[Tensor, Tensor]:
    """PromptEncoder's embeddings. It takes boxes apart from points; here a box is two points of their own kinds."""
    encoder, labels = sam.prompt_encoder, asked.labels[..., None]
    sparse = encoder.pe_layer.forward_with_coords(asked.points + 0.5, encoder.input_image_size)
    sparse = torch.where(labels == -1, encoder.not_a_point_embed.weight, sparse)
    for kind, embedding in enumerate(encoder.point_embeddings):
        sparse = sparse + embedding.weight * (labels == kind)
    if asked.previous is None:
        return sparse, encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    return sparse, encoder.mask_downscaling(asked.previous)


def _attend_both_ways(
    transformer: Any, source: Tensor, images: Tensor | None, place: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """TwoWayTransformer.forward. source: (images, hw, C), or (n, hw, C) when images is None. tokens: (n, t, C)."""
    queries, keys = tokens, source
    for layer in transformer.layers:
        placed = queries if layer.skip_first_layer_pe else queries + tokens
        attended = layer.self_attn(q=placed, k=placed, v=queries)
        queries = layer.norm1(attended if layer.skip_first_layer_pe else queries + attended)
        look, shown = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        placed_keys = keys + place
        seen = _attend(
            look,
            look.q_proj(queries + tokens),
            _of_each(look.k_proj(placed_keys), images),
            _of_each(look.v_proj(keys), images),
        )
        queries = layer.norm2(queries + seen)
        queries = layer.norm3(queries + layer.mlp(queries))
        told = _attend(
            shown,
            _of_each(shown.q_proj(placed_keys), images),
            shown.k_proj(queries + tokens),
            shown.v_proj(queries),
        )
        keys, images = layer.norm4(_of_each(keys, images) + told), None
    look = transformer.final_attn_token_to_image
    seen = _attend(look, look.q_proj(queries + tokens), look.k_proj(keys + place), look.v_proj(keys))
    return transformer.norm_final_attn(queries + seen), keys


def _of_each(values: Tensor, images: Tensor | None) -> Tensor:
    """The values of each prompt's image. images: None when each prompt has its own already."""
    return values if images is None else values.index_select(0, images)


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """segment_anything's Attention after its projections. All (n, length, channels)."""
    heads = attention.num_heads
    query, key, value = (_by_head(part, heads) for part in (query, key, value))
    seen = F.scaled_dot_product_attention(query, key, value)
    attended: Tensor = attention.out_proj(seen.transpose(1, 2).flatten(2))
    return attended


def _by_head(values: Tensor, heads: int) -> Tensor:
    count, length, channels = values.shape
    return values.view(count, length, heads, channels // heads).transpose(1, 2)


def _draw(upscaling: Any, pixels: Tensor, kernels: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Upscale pixels (n, hw, C) fourfold and multiply with kernels (n, c, outputs): logits (n, outputs, 4 h, 4 w).

    A transposed convolution whose stride is its size is a linear map of each pixel to its 2 x 2 new ones.
    """
    first, norm, activation, second, last_activation = upscaling
    height, width = grid_hw
    fine = _split(first, pixels)  # (n, hw, 4, c)
    fine = activation(F.layer_norm(fine, fine.shape[-1:], norm.weight, norm.bias, norm.eps))
    fine = last_activation(_split(second, fine.flatten(1, 2)))  # (n, hw * 4, 4, c)
    logits: Tensor = fine.flatten(1, 2) @ kernels
    # from (row, column, rows of 2, columns of 2, rows of 2, columns of 2) to (outputs, rows, columns)
    logits = logits.view(len(logits), height, width, 2, 2, 2, 2, -1).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return logits.reshape(*logits.shape[:2], 4 * height, 4 * width)


def _split(convolution: Any, pixels: Tensor) -> Tensor:
    """ConvTranspose2d of size and stride 2 on pixels (n, m, C): (n, m, 4, c), the new pixels row by row."""
    channels, new_channels = convolution.weight.shape[:2]
    weight = convolution.weight.permute(2, 3, 1, 0).reshape(4 * new_channels, channels)
    split = F.linear(pixels, weight, convolution.bias.repeat(4))
    return split.view(*split.shape[:2], 4, new_channels)
