"""SAM's mask decoder with its sums grouped differently: one image, many prompts, half the arithmetic or less.

MaskDecoder repeats the image's embedding for every prompt, and projects its 4,096 positions ten times for each prompt.
Here the first layer's projections of the image are computed once. In the other layers the projection is folded into the
seven tokens that attend (7 tokens x 8 heads = 56 vectors instead of 128 columns). The predicted IoUs come first. Only
wanted prompts are upscaled, only down to the last row that the image covers, channels last. In exact arithmetic the
result is the same; in float32 the logits differ by rounding (about 1e-5 for logits of 10).

Positions are (n, keys, channels), keys = h * w in row order. Attention is by (head, token): 56 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int]

# Below this width (sam_nano's is 128) the decoder is called unchanged. Folding would save little time there, and the
# masks would no longer equal the reference's in every pixel.
FOLD_FROM_DIM = 256


def folds(decoder: MaskDecoder, *, from_dim: int = FOLD_FROM_DIM) -> bool:
    """Whether `FoldedDecoder` can replace this module: it is MaskDecoder itself, and wide enough to save time."""
    if type(decoder) is not MaskDecoder or type(decoder.transformer) is not TwoWayTransformer:
        return False
    width: int = decoder.transformer_dim
    return width >= from_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageKeys:
    """The tensors that all prompts of one image share.

    source, position: (keys, channels). grid: (h, w) of the embedding.
    first_key, first_value, first_query: (heads, keys, channels of a head), the first layer's projections.
    """

    source: Tensor
    position: Tensor
    first_key: Tensor
    first_value: Tensor
    first_query: Tensor
    grid: Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptState:
    """Prompts after the transformer. keys: (n, keys, channels), mask_tokens: (n, masks, channels), iou: (n, masks)."""

    keys: Tensor
    mask_tokens: Tensor
    iou: Tensor


class FoldedDecoder:
    """Reads a MaskDecoder's weights when it is called. Holds no image."""

    def __init__(self, decoder: MaskDecoder) -> None:
        self.decoder = decoder
        self.layers = decoder.transformer.layers

    def image_keys(self, embedding: Tensor, position: Tensor, dense: Tensor) -> ImageKeys:
        """Project one image. embedding, position: (1, C, h, w). dense: (1, C, h, w), for prompts without a mask."""
        source = (embedding + dense).flatten(2)[0].T.contiguous()
        place = position.flatten(2)[0].T.contiguous()
        reads, writes = self.layers[0].cross_attn_token_to_image, self.layers[0].cross_attn_image_to_token
        return ImageKeys(
            source=source,
            position=place,
            first_key=_split(reads.k_proj(source + place), reads),
            first_value=_split(reads.v_proj(source), reads),
            first_query=_split(writes.q_proj(source + place), writes),
            grid=(embedding.shape[2], embedding.shape[3]),
        )

    def attend(self, image: ImageKeys, sparse: Tensor) -> PromptState:
        """Run the transformer on prompts (n, tokens, channels)."""
        decoder = self.decoder
        output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        place = torch.cat([output.expand(len(sparse), -1, -1), sparse], dim=1)
        queries, keys = place, image.source.expand(len(sparse), -1, -1)
        for number, layer in enumerate(self.layers):
            queries = _attend_to_themselves(layer, queries, place)
            positioned = keys if number == 0 else keys + image.position.to(keys.dtype)
            shared = image if number == 0 else None
            queries = layer.norm2(
                queries + _read(layer.cross_attn_token_to_image, queries + place, keys, positioned, shared=shared)
            )
            queries = layer.norm3(queries + layer.mlp(queries))
            keys = _write(layer.cross_attn_image_to_token, queries + place, queries, keys, positioned, shared=shared)
            keys = _norm(layer.norm4, keys)
        transformer = decoder.transformer
        positioned = keys + image.position.to(keys.dtype)
        read = _read(transformer.final_attn_token_to_image, queries + place, keys, positioned, shared=None)
        queries = transformer.norm_final_attn(queries + read)
        masks = decoder.num_mask_tokens
        # in float32 even under autocast: rounding to bfloat16 would lose up to 14 % of the masks
        with torch.autocast(queries.device.type, enabled=False):
            iou = decoder.iou_prediction_head(queries[:, 0].float())
        return PromptState(keys=keys, mask_tokens=queries[:, 1 : 1 + masks], iou=iou)

    def upscale(self, state: PromptState, prompts: Tensor | slice, outputs: slice, grid: Grid, used: Grid) -> Tensor:
        """Logits of some outputs of m prompts: (m, outputs, 4 * rows, 4 * columns).

        prompts: numbers (m,) or a slice. used: (rows, columns), the part of the grid to compute, from the top left.
        """
        mlps = list(self.decoder.output_hypernetworks_mlps)[outputs]
        tokens = state.mask_tokens[prompts, outputs].unbind(1)
        m = len(tokens[0])
        kernels = torch.stack([mlp(token) for mlp, token in zip(mlps, tokens, strict=True)], dim=1)
        grow, norm, bend, grow_again, bend_again = self.decoder.output_upscaling
        rows, columns = used
        pixels = state.keys[prompts].view(m, *grid, -1)[:, :rows, :columns]
        pixels = _grow(grow, pixels)
        pixels = bend(_norm(norm, pixels))
        pixels = bend_again(_grow(grow_again, pixels))
        logits: Tensor = pixels.flatten(1, -2) @ kernels.transpose(1, 2)
        # (m, row, column, row in 2, column in 2, row in 4, column in 4, output)
        parts = logits.view(m, rows, columns, 2, 2, 2, 2, len(mlps))
        return parts.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(m, len(mlps), 4 * rows, 4 * columns)


def _attend_to_themselves(layer: TwoWayAttentionBlock, queries: Tensor, place: Tensor) -> Tensor:
    if layer.skip_first_layer_pe:
        attended: Tensor = layer.norm1(layer.self_attn(q=queries, k=queries, v=queries))
    else:
        placed = queries + place
        attended = layer.norm1(queries + layer.self_attn(q=placed, k=placed, v=queries))
    return attended


def _read(
    attention: Attention, placed: Tensor, keys: Tensor, positioned: Tensor, *, shared: ImageKeys | None
) -> Tensor:
    """Tokens attend to the image: (n, tokens, channels).

    A key's bias shifts all scores of a token by the same amount, so softmax removes it. A value's bias passes through
    unchanged.
    """
    query = _split(attention.q_proj(placed), attention) / sqrt(attention.internal_dim // attention.num_heads)
    n, heads, tokens, channels = query.shape
    if shared is not None:
        scores = query.transpose(0, 1).reshape(heads, n * tokens, channels) @ shared.first_key.transpose(1, 2)
        read = (scores.softmax(-1) @ shared.first_value).view(heads, n, tokens, channels).transpose(0, 1)
    else:
        folded = (query @ _by_head(attention.k_proj.weight, heads)).flatten(1, 2)
        weights = torch.bmm(folded, positioned.transpose(1, 2)).softmax(-1)
        values = torch.bmm(weights, keys).view(n, heads, tokens, -1)
        read = values @ _by_head(attention.v_proj.weight, heads).transpose(1, 2)
        read = read + attention.v_proj.bias.view(heads, 1, -1)
    output: Tensor = attention.out_proj(read.transpose(1, 2).flatten(2))
    return output


def _write(
    attention: Attention, placed: Tensor, queries: Tensor, keys: Tensor, positioned: Tensor, *, shared: ImageKeys | None
) -> Tensor:
    """The image attends to the tokens: keys plus the attended values, (n, keys, channels), before the norm."""
    key = _split(attention.k_proj(placed), attention) / sqrt(attention.internal_dim // attention.num_heads)
    n, heads, tokens, channels = key.shape
    if shared is not None:
        scores = key.transpose(0, 1).reshape(heads, n * tokens, channels) @ shared.first_query.transpose(1, 2)
        weights = scores.view(heads, n, tokens, -1).transpose(0, 1).softmax(2)
    else:
        folded = (key @ _by_head(attention.q_proj.weight, heads)).flatten(1, 2)
        bias = (key @ attention.q_proj.bias.view(heads, -1, 1)).flatten(1, 2)
        weights = torch.baddbmm(bias, folded, positioned.transpose(1, 2)).view(n, heads, tokens, -1).softmax(2)
    value = _split(attention.v_proj(queries), attention) @ _by_head(attention.out_proj.weight.T, heads)
    # a key's weights sum to 1 in each head, so the output's bias can be added to the tokens' values
    value = (value + attention.out_proj.bias / heads).flatten(1, 2)
    return torch.baddbmm(keys, weights.flatten(1, 2).transpose(1, 2), value)


def _norm(norm: nn.LayerNorm | LayerNorm2d, values: Tensor) -> Tensor:
    """Normalise the last dimension in the values' own dtype. Autocast would convert them to float32.

    The sums are in float32 in both cases. The positions of the image, for every prompt, are most of the memory that the
    decoder reads and writes, so a smaller dtype saves time.
    """
    weight, bias = norm.weight.to(values.dtype), norm.bias.to(values.dtype)
    with torch.autocast(values.device.type, enabled=False):
        return F.layer_norm(values, values.shape[-1:], weight, bias, norm.eps)


def _split(projected: Tensor, attention: Attention) -> Tensor:
    """From (..., tokens, channels) to (..., heads, tokens, channels of a head)."""
    by_head = projected.view(*projected.shape[:-1], attention.num_heads, -1)
    return by_head.transpose(-3, -2).contiguous()


def _by_head(weight: Tensor, heads: int) -> Tensor:
    """A weight of (channels of all heads, channels) as (heads, channels of a head, channels)."""
    return weight.reshape(heads, -1, weight.shape[1])


def _grow(grow: nn.ConvTranspose2d, pixels: Tensor) -> Tensor:
    """A 2 x 2 transposed convolution of stride 2 on (..., channels): (..., 2, 2, channels out)."""
    weight = grow.weight.permute(0, 2, 3, 1).flatten(1)
    bias = None if grow.bias is None else grow.bias.repeat(4)
    return F.linear(pixels, weight.T, bias).view(*pixels.shape[:-1], 2, 2, -1)
