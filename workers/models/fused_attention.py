"""The attention of SAM's image encoder as one product, for torch's fused kernels.

To the score of two places SAM adds one term for their rows and one for their columns (decomposed relative positions, Li
et al., MViTv2, arXiv:2112.01526; segment_anything/modeling/image_encoder.py). Computed alone, these terms need a tensor
of 4,096 x 4,096 scores for each head. Both terms are products with the query, so the query can hold them. With one-hot
rows and columns of the key's place, [q / sqrt(c), q Rh, q Rw] . [k, row, column] is the same score, up to rounding.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn
from torch.nn import functional as F


def fuse_attention(encoder: nn.Module) -> None:
    """Replace every Attention that has relative positions by FusedAttention. The names of the weights stay."""
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Attention and child.use_rel_pos:
                setattr(parent, name, FusedAttention(child))


class FusedAttention(nn.Module):
    """Shares an Attention's weights and computes the same, on the grid size for which the Attention was built."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.scale: float = attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, h, w, channels). The result has the same shape."""
        n, height, width, _ = x.shape
        qkv = self.qkv(x).view(n, height * width, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (n, heads, places, channels of a head) each
        placed = query.unflatten(2, (height, width))
        rows = torch.einsum("nahwc,hkc->nahwk", placed, _between(height, self.rel_pos_h)).flatten(2, 3)
        columns = torch.einsum("nahwc,wkc->nahwk", placed, _between(width, self.rel_pos_w)).flatten(2, 3)
        places = _one_hot_places(height, width, key).expand(n, self.num_heads, -1, -1)
        queries = torch.cat([query * self.scale, rows, columns], dim=-1)
        keys = torch.cat([key, places], dim=-1)
        channels = value.shape[-1]
        if value.dtype is not torch.float32:  # flash attention needs values as wide as the keys
            value = F.pad(value, (0, keys.shape[-1] - channels))
        read = F.scaled_dot_product_attention(queries, keys, value, scale=1.0)[..., :channels]
        projected: Tensor = self.proj(read.transpose(1, 2).reshape(n, height, width, -1))
        return projected


def _between(size: int, table: Tensor) -> Tensor:
    """The rows of table (2 * size - 1, c) for the distance between every two places on an axis: (size, size, c)."""
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place + size - 1]


def _one_hot_places(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, height + width): 1 at each place's row and at its column."""
    rows = torch.eye(height, dtype=like.dtype, device=like.device).repeat_interleave(width, dim=0)
    columns = torch.eye(width, dtype=like.dtype, device=like.device).repeat(height, 1)
    return torch.cat([rows, columns], dim=1)
