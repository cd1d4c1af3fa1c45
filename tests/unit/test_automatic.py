"""The mask engine against segment_anything's own SamAutomaticMaskGenerator and SamPredictor."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils import amg
from torch import nn
from torch.nn import functional as F
from torchvision.ops.boxes import batched_nms

from tests.pixels import decode_counts
from workers.engine import upsampling
from workers.engine.automatic import ModelOutputError, automatic_masks, embed, prompt_logits
from workers.engine.boxed_runs import draw_runs, encode_runs, take_runs
from workers.engine.folded_decoder import folds
from workers.engine.interpolation import kernel_is_known
from workers.engine.small_regions import remove_small_regions
from workers.engine.suppression import Suppression
from workers.masks import encode_counts
from workers.models.nano import load_sam_nano
from workers.models.registry import MODELS
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
@settings(CPU_BOUND, max_examples=8)
def test_every_mask_is_the_references_to_the_bit_and_in_its_order(size, params, seed, tied, patch):
    sam = make_sam(patch=patch, seed=seed, tied=tied)
    image = make_image(*size, seed)
    ours = our_masks(sam, image, params)
    try:
        reference = reference_masks(sam, image, params)
    except (IndexError, ValueError, AssertionError, ZeroDivisionError, RuntimeError):
        # It fails on images too thin for its resize, on crops without pixels, and when no crop has a mask.
        assume(False)

    assert [mask[:4] + mask[5:] for mask in ours] == [mask[:4] + mask[5:] for mask in reference]
    for (*_, area_px, _, our_score, _), (*_, reference_score, _) in zip(ours, reference, strict=True):
        # The two decoders' logits differ by rounding (3e-7), so one pixel may be on the other side of the offset.
        assert our_score == pytest.approx(reference_score, abs=2 / max(area_px, 1), nan_ok=True)


@pytest.mark.slow
def test_twelve_megapixels_are_the_references_to_the_bit():
    sam, image = make_sam(), np.zeros((3000, 4000, 3), np.uint8)
    params = AutomaticParams(points_per_side=1, pred_iou_thresh=0.0, stability_score_thresh=0.5)

    assert our_masks(sam, image, params) == reference_masks(sam, image, params)


@pytest.mark.slow
def test_equal_scores_keep_the_references_order_beyond_a_thousand_candidates():
    sam, image = make_sam(tied=True), make_image(24, 24)
    params = AutomaticParams(
        points_per_side=19, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=0.9, points_per_batch=400
    )

    assert our_masks(sam, image, params) == reference_masks(sam, image, params)


def test_a_torch_with_another_order_of_operations_is_asked_itself(monkeypatch):
    sam, image = make_sam(), make_image(97, 128)
    params = AutomaticParams(points_per_side=5, pred_iou_thresh=0.0, stability_score_thresh=0.5)
    known = our_masks(sam, image, params)

    monkeypatch.setattr(upsampling, "kernel_is_known", lambda: False)
    monkeypatch.setattr(upsampling, "DOUBT", np.float32(0.01))

    assert our_masks(sam, image, params) == known


def test_this_build_of_torch_rounds_as_written_down():
    assert kernel_is_known()


@pytest.mark.parametrize("broken", ["iou", "logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_nan_or_infinity_is_an_error_not_an_empty_image(broken, value):
    sam = make_sam()
    (sam.mask_decoder.iou if broken == "iou" else sam.mask_decoder.bank[:, 3, 3]).fill_(value)

    with pytest.raises(ModelOutputError, match="NaN or infinity"):
        automatic_masks(sam, make_image(100, 100), AutomaticParams(points_per_side=2, pred_iou_thresh=0.0))


def test_no_points_give_no_masks():
    params = AutomaticParams(point_grids=((),))

    assert automatic_masks(make_sam(), make_image(30, 30), params) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (1, 3000)])
def test_images_one_pixel_thin_are_masked_however_long(size):
    params = AutomaticParams(points_per_side=3, pred_iou_thresh=0.0, stability_score_thresh=0.0)

    masks = automatic_masks(make_sam(), make_image(*size), params)

    assert masks
    assert {mask.size_hw for mask in masks} == {size}


def test_a_mask_that_covers_everything_starts_with_foreground():
    sam = make_sam()
    sam.mask_decoder.bank.fill_(9.0)

    masks = automatic_masks(sam, make_image(50, 70), AutomaticParams(points_per_side=1, pred_iou_thresh=0.0))

    assert (masks[0].area_px, masks[0].bbox_xywh) == (50 * 70, (0, 0, 70, 50))
    assert masks[0].counts == encode_counts(np.ones((50, 70), np.bool_))


def test_our_own_filters_come_after_the_references():
    sam, image = make_sam(), make_image(100, 120)
    params = AutomaticParams(points_per_side=6, pred_iou_thresh=0.0, stability_score_thresh=0.5)
    every = automatic_masks(sam, image, params)
    areas = sorted(mask.area_px for mask in every)

    smaller = automatic_masks(sam, image, replace(params, max_area_fraction=areas[-2] / 12_000))
    larger = automatic_masks(sam, image, replace(params, min_area_px=areas[1]))
    best = automatic_masks(sam, image, replace(params, max_masks=2))

    assert smaller == [mask for mask in every if mask.area_px <= areas[-2]]
    assert larger == [mask for mask in every if mask.area_px >= areas[1]]
    assert best == every[:2]


def test_a_given_embedding_is_used_and_is_what_the_predictor_computes():
    sam, image = make_sam(planted=False), make_image(60, 90)
    predictor = SamPredictor(sam)
    predictor.set_image(image)

    embeddings = embed(sam, [image, make_image(128, 20)])

    assert [embedding.shape for embedding in embeddings] == [(1, 32, 8, 8)] * 2
    assert torch.equal(embed(sam, [image])[0], predictor.features)
    assert torch.allclose(embeddings[0], predictor.features, atol=1e-5)
    params = AutomaticParams(points_per_side=2, pred_iou_thresh=-9.0, stability_score_thresh=0.0)
    assert automatic_masks(sam, image, params, embedding=embed(sam, [image])[0]) == automatic_masks(sam, image, params)


@pytest.mark.slow
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("dim", [32, 256])
@pytest.mark.parametrize("kind", ["points", "box", "both"])
def test_many_prompts_decode_as_a_predictor_decodes_each(multimask, dim, kind):
    sam, image = make_sam(planted=False, dim=dim), make_image(60, 90)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    random = np.random.default_rng(0)
    points = random.uniform(0, 60, (5, 2, 2)) if kind != "box" else None
    labels = random.integers(0, 2, (5, 2)) if kind != "box" else None
    boxes = random.uniform(0, 60, (5, 4)) if kind != "points" else None

    logits, iou = prompt_logits(
        sam,
        predictor.features,
        size_hw=(60, 90),
        point_coords=points,
        point_labels=labels,
        boxes_xyxy=boxes,
        multimask=multimask,
        at_once=2,
    )

    for number in range(5):
        _, their_iou, their_logits = predictor.predict(
            point_coords=None if points is None else points[number],
            point_labels=None if labels is None else labels[number],
            box=None if boxes is None else boxes[number],
            multimask_output=multimask,
        )
        assert np.allclose(logits[number], their_logits, atol=1e-5)
        assert np.allclose(iou[number], their_iou, atol=1e-5)


@pytest.mark.slow
def test_the_folded_decoder_gives_the_same_masks_up_to_single_pixels():
    sam, image = make_sam(planted=False, dim=256, seed=3), make_image(90, 128)
    params = AutomaticParams(points_per_side=4, pred_iou_thresh=-9.0, stability_score_thresh=0.0, box_nms_thresh=0.9)
    assert folds(sam.mask_decoder)

    ours, theirs = our_masks(sam, image, params), reference_masks(sam, image, params)

    assert [mask[5] for mask in ours] == [mask[5] for mask in theirs]
    pixels = [[decode_counts(mask[0], (90, 128)) for mask in masks] for masks in (ours, theirs)]
    assert sum(int((a ^ b).sum()) for a, b in zip(*pixels, strict=True)) <= 5


def test_fast_multiplies_in_bfloat16_and_finds_much_the_same():
    sam, image = make_sam(planted=False, dim=256, seed=3), make_image(90, 128)
    params = AutomaticParams(points_per_side=2, pred_iou_thresh=-9.0, stability_score_thresh=0.0, box_nms_thresh=1.0)

    exact, fast = automatic_masks(sam, image, params), automatic_masks(sam, image, replace(params, precision="fast"))

    assert [mask.predicted_iou for mask in fast] != [mask.predicted_iou for mask in exact]
    assert len(fast) == len(exact)
    assert np.isclose(np.mean([m.area_px for m in fast]), np.mean([m.area_px for m in exact]), rtol=0.1)


@given(
    pixels=hypothesis_numpy.arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9))),
    corner=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    rest=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
@settings(CPU_BOUND, max_examples=100)
def test_boxed_runs_encode_as_the_whole_frame_does(pixels, corner, rest):
    frame = np.zeros((corner[1] + pixels.shape[1] + rest[1], corner[0] + pixels.shape[0] + rest[0]), np.bool_)
    frame[corner[1] : corner[1] + pixels.shape[1], corner[0] : corner[0] + pixels.shape[0]] = pixels.T

    runs = take_runs(pixels, corner)

    assert encode_runs(runs, frame.shape) == encode_counts(frame)
    assert runs.area_px == frame.sum()
    if runs.area_px:
        x0, y0, x1, y1 = runs.box
        assert np.array_equal(draw_runs(runs), frame[y0 : y1 + 1, x0 : x1 + 1].T)


@given(
    frame=hypothesis_numpy.arrays(np.bool_, st.tuples(st.integers(1, 14), st.integers(1, 14))),
    box=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 14), st.integers(1, 14)),
    least=st.integers(1, 40),
)
@settings(CPU_BOUND, max_examples=100)
def test_small_regions_go_as_in_the_reference(frame, box, least):
    outside = np.ones_like(frame)
    outside[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = False
    frame = frame & ~outside
    filled, holes = amg.remove_small_regions(frame, least, mode="holes")
    expected, islands = amg.remove_small_regions(filled, least, mode="islands")

    cleaned, changed = remove_small_regions(take_runs(np.ascontiguousarray(frame.T), (0, 0)), frame.shape, least)

    assert encode_runs(cleaned, frame.shape) == encode_counts(np.ascontiguousarray(expected))
    assert changed == (holes or islands)


corners = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 9), st.integers(0, 9))
boxes = corners.map(lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3]))


@given(offered=st.lists(boxes, min_size=1, max_size=30), threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
@settings(CPU_BOUND, max_examples=100)
def test_suppression_keeps_what_torchvision_keeps_and_bounds_never_drop_more(offered, threshold):
    scores = torch.linspace(1, 0, len(offered))
    kept = batched_nms(torch.tensor(offered).float(), scores, torch.zeros(len(offered)), threshold).tolist()
    suppression = Suppression(threshold)

    for number, (x0, y0, x1, y1) in enumerate(offered):
        inner = (x0 + (x1 - x0) // 4, y0, x1, y1 - (y1 - y0) // 4)
        dropped = suppression.would_drop(inner, (x0 - 1, y0, x1 + 1, y1))
        is_kept = suppression.keep((x0, y0, x1, y1))
        assert is_kept == (number in kept)
        assert not (dropped and is_kept)


@pytest.mark.slow
@pytest.mark.parametrize("photo", ["photos_plain/sam_dog.jpg", "photos_masks/pennfudan"])
def test_sam_nano_finds_the_references_masks_on_photos(testdata, photo):
    path = testdata / photo
    if path.is_dir():
        path = min(path.rglob("*.jpg"), default=min(path.rglob("*.png"), default=path / "none"))
    sam = load_sam_nano("cpu")
    image = np.asarray(Image.open(path).convert("RGB"))
    params = AutomaticParams(**{**MODELS["sam_nano"].defaults, "points_per_side": 6})

    assert our_masks(sam, image, params) == reference_masks(sam, image, params)
