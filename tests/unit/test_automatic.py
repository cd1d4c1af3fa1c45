"""The mask engine against segment_anything's own SamAutomaticMaskGenerator and SamPredictor."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from torch.nn import functional as F

from workers.automatic import automatic_masks
from workers.params import AutomaticParams

# Not shrunk: it would take minutes, and the examples are small.
CPU_BOUND = settings(
    deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate)
)


class PlantedDecoder(nn.Module):
    """Smooth random masks with holes, islands, duplicates and equal scores: a function of the prompt, not the image.

    It has MaskDecoder's signature; the bank of logits is (24, low, low).
    """

    def __init__(self, low: int, seed: int, tied: bool) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        bank = []
        for size in (3, 4, 6, 9) * 6:
            noise = torch.randn(1, 1, size, size, generator=random)
            smooth = F.interpolate(noise, (low, low), mode="bicubic", align_corners=False)[0, 0]
            bank.append(smooth * 12 + 8 * torch.randn(1, generator=random))
        self.bank = torch.stack(bank)
        self.iou = 0.8 + 0.2 * torch.rand(24, generator=random)
        if tied:
            self.iou = (self.iou * 20).round() / 20
        self.key = torch.randn(3, 4096, generator=random, dtype=torch.float64)

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output):
        prompt = sparse_prompt_embeddings.double().flatten(1)
        hashed = ((prompt @ self.key[:, : prompt.shape[1]].T) * 1000).sin().abs()
        number = (hashed * 23.999).long()
        logits = self.bank[number] + hashed[:, :, None, None].float()
        return logits, self.iou[number]


def make_sam(*, patch: int = 16, grid: int = 8, dim: int = 32, seed: int = 0, planted: bool = True, tied: bool = False):
    """A Sam of segment_anything's modules, far too small to see anything; planted masks make up for it."""
    torch.manual_seed(seed)
    encoder = ImageEncoderViT(
        img_size=patch * grid,
        patch_size=patch,
        embed_dim=16,
        depth=1,
        num_heads=2,
        out_chans=dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
    )
    prompts = PromptEncoder(
        embed_dim=dim, image_embedding_size=(grid, grid), input_image_size=(patch * grid,) * 2, mask_in_chans=16
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=64, num_heads=8)
    decoder = MaskDecoder(transformer_dim=dim, transformer=transformer, iou_head_hidden_dim=32)
    sam = Sam(encoder, prompts, PlantedDecoder(4 * grid, seed, tied) if planted else decoder)
    return sam.eval().requires_grad_(False)


def make_image(height: int, width: int, seed: int = 0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference_masks(sam, image, params: AutomaticParams):
    """What the reference finds, as tuples that `ours` gives too; its boxes leave out the last pixel, COCO's do not."""
    grids = None if params.point_grids is None else [np.array(grid) for grid in params.point_grids]
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=params.points_per_side if grids is None else None,
        points_per_batch=params.points_per_batch,
        pred_iou_thresh=params.pred_iou_thresh,
        stability_score_thresh=params.stability_score_thresh,
        stability_score_offset=params.stability_score_offset,
        box_nms_thresh=params.box_nms_thresh,
        crop_n_layers=params.crop_n_layers,
        crop_nms_thresh=params.crop_nms_thresh,
        crop_overlap_ratio=params.crop_overlap_ratio,
        crop_n_points_downscale_factor=params.crop_n_points_downscale_factor,
        point_grids=grids,
        min_mask_region_area=params.min_mask_region_area,
        output_mode="coco_rle",
    )
    found = []
    for mask in generator.generate(image):
        x, y, width, height = mask["bbox"]
        box = (x, y, width + 1, height + 1) if mask["area"] else (0, 0, 0, 0)
        stability = mask["stability_score"]
        score = None if np.isnan(stability) else stability
        counts = mask["segmentation"]["counts"]
        found.append((counts, box, mask["area"], mask["predicted_iou"], score, [*mask["point_coords"][0], 1]))
    return found


def our_masks(sam, image, params: AutomaticParams):
    return [
        (m.counts, m.bbox_xywh, m.area_px, m.predicted_iou, m.stability_score, m.prompt["points"][0])
        for m in automatic_masks(sam, image, params)
    ]


sizes = st.one_of(
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.tuples(st.just(1), st.integers(1, 200)),
    st.integers(20, 60).map(lambda side: (side, 3 * side)),
    st.sampled_from([(96, 128), (128, 97), (300, 200), (1, 1), (2, 3)]),
)
parameters = st.builds(
    AutomaticParams,
    points_per_side=st.integers(1, 5),
    points_per_batch=st.integers(1, 20),
    pred_iou_thresh=st.sampled_from([-1.0, 0.0, 0.85, 0.9, 0.99, 2.0]),
    stability_score_thresh=st.sampled_from([-1.0, 0.0, 0.6, 0.8, 0.95, 1.1]),
    stability_score_offset=st.sampled_from([0.0, 0.3, 1.0, 4.0, -0.5]),
    box_nms_thresh=st.sampled_from([0.0, 0.4, 0.7, 1.0]),
    crop_n_layers=st.sampled_from([0, 0, 0, 1, 1, 2]),
    crop_nms_thresh=st.sampled_from([0.3, 0.7, 1.0]),
    crop_overlap_ratio=st.sampled_from([0.0, 0.34, 0.8]),
    crop_n_points_downscale_factor=st.integers(1, 2),
    min_mask_region_area=st.sampled_from([0, 1, 20, 400, 100_000]),
)


@given(size=sizes, params=parameters, seed=st.integers(0, 5), tied=st.booleans(), patch=st.sampled_from([8, 14, 16]))
@example(size=(128, 96), params=AutomaticParams(points_per_side=6), seed=0, tied=False, patch=16)
@settings(CPU_BOUND, max_examples=25)
def test_every_mask_is_the_references_to_the_bit_and_in_its_order(size, params, seed, tied, patch):
    sam = make_sam(patch=patch, seed=seed, tied=tied)
    image = make_image(*size, seed)
    ours = our_masks(sam, image, params)
    try:
        reference = reference_masks(sam, image, params)
    except (IndexError, ValueError, AssertionError, ZeroDivisionError, RuntimeError):
        # It fails on images too thin for its resize, on crops without pixels, and when no crop has a mask.
        assume(False)

    assert ours == reference
