"""SAM's image attention as one product, against segment_anything's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.test_automatic import make_sam
from tests.unit.test_device_search import Copies, move_to_pretended_gpu
from workers.models.fused_attention import FusedAttention, fuse_attention


def make_encoder(*, image_px: int, width: int, depth: int, heads: int, window: int) -> ImageEncoderViT:
    """Every second block without windows; relative positions are random, where segment_anything starts them at 0."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=image_px,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        out_chans=32,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=tuple(range(1, depth, 2)),
    )
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or name == "pos_embed":
            nn.init.normal_(parameter, std=0.5)
    return encoder.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "sizes",
    [
        {"image_px": 128, "width": 32, "depth": 2, "heads": 2, "window": 3},
        {"image_px": 320, "width": 768, "depth": 2, "heads": 12, "window": 14},  # vit_b's width, heads and windows
        {"image_px": 240, "width": 160, "depth": 2, "heads": 2, "window": 14},  # vit_h's 80 channels a head
    ],
)
@pytest.mark.parametrize("images", [1, 2])
def test_the_encoder_gives_the_same_embedding(sizes: dict[str, int], images: int) -> None:
    encoder = make_encoder(**sizes)
    pixels = torch.randn(images, 3, sizes["image_px"], sizes["image_px"], generator=torch.Generator().manual_seed(1))
    expected = encoder(pixels)

    fuse_attention(encoder)

    assert [type(block.attn) for block in encoder.blocks] == [FusedAttention] * len(encoder.blocks)
    assert torch.allclose(encoder(pixels), expected, atol=1e-4)


def test_relative_positions_matter_in_that_comparison() -> None:
    encoder = make_encoder(image_px=128, width=32, depth=2, heads=2, window=3)
    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    expected = encoder(pixels)

    fuse_attention(encoder)
    for block in encoder.blocks:
        block.attn.rel_pos_h.zero_()

    assert not torch.allclose(encoder(pixels), expected, atol=1e-2)


def test_in_bfloat16_it_is_no_further_from_float32_than_the_modules_own() -> None:
    encoder = make_encoder(image_px=240, width=160, depth=2, heads=2, window=14)
    pixels = torch.randn(1, 3, 240, 240, generator=torch.Generator().manual_seed(1))
    exact = encoder(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = encoder(pixels).float()
        fuse_attention(encoder)
        fused = encoder(pixels).float()

    assert (fused - exact).norm() <= 1.1 * (own - exact).norm()


def test_on_a_gpu_the_encoder_copies_nothing_to_it() -> None:
    encoder = make_encoder(image_px=128, width=32, depth=2, heads=2, window=3)
    seen = []
    for change in (lambda encoder: None, fuse_attention):
        change(encoder)
        with torch.no_grad(), FakeTensorMode():
            move_to_pretended_gpu(encoder)
            pixels = torch.empty(1, 3, 128, 128, device="cuda")
            with Copies() as copies:
                encoder(pixels)
        seen.append(copies.seen)

    assert seen[0]  # segment_anything's own looks positions up with indices from the CPU
    assert seen[1] == []


def test_the_names_of_the_weights_stay() -> None:
    sam = make_sam()
    names = set(sam.state_dict())

    fuse_attention(sam)

    assert set(sam.state_dict()) == names
