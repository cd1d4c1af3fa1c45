"""The mask engine on a CUDA device. Not run so far: no GPU was at hand when it was written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import Sam

from tests.benchmarks.engine import photo, tiny_sam
from tests.pixels import decode_counts
from workers.engine import decoder
from workers.engine.automatic import automatic_masks, embed
from workers.engine.prompted import prompted_masks
from workers.masks import Mask
from workers.models.fused_attention import fuse_attention
from workers.models.nano import load_sam_nano
from workers.models.registry import MODELS
from workers.params import AutomaticParams, PromptParams
from workers.prompts import Prompt
from workers.training.scenes import draw_scene

pytestmark = pytest.mark.gpu
THRESHOLDS: dict[str, Any] = {"points_per_side": 8, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0}


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(decoder, "_found_to_fit", {})


@pytest.fixture(scope="module")
def vit_b() -> Sam:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    return sam_model_registry["vit_b"]().eval().requires_grad_(False).cuda()


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return photo(1024, 683)


def mean_iou(masks: list[Mask], reference: list[dict[str, Any]]) -> float:
    """Of each of the reference's masks with the best of ours."""
    return float(coco_mask.iou(rles(masks), reference, [0] * len(reference)).max(axis=0).mean())


def rles(masks: list[Mask]) -> list[dict[str, Any]]:
    return [{"size": mask.size_hw, "counts": mask.counts.encode()} for mask in masks]


@pytest.mark.parametrize(("precision", "least"), [("exact", 0.99), ("fast", 0.9)])
def test_masks_agree_with_the_references_on_the_same_device(
    vit_b: Sam, image: np.ndarray, precision: str, least: float
) -> None:
    reference = SamAutomaticMaskGenerator(vit_b, **THRESHOLDS, output_mode="coco_rle").generate(image)

    masks = automatic_masks(vit_b, image, AutomaticParams(**THRESHOLDS, precision=precision))

    assert mean_iou(masks, [mask["segmentation"] for mask in reference]) >= least


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_exact_keeps_what_the_cpu_keeps_but_for_single_pixels(image: np.ndarray, crop_n_layers: int) -> None:
    params = AutomaticParams(points_per_side=16, crop_n_layers=crop_n_layers)
    there, here = automatic_masks(tiny_sam().cuda(), image, params), automatic_masks(tiny_sam(), image, params)

    by_point = {str(mask.prompt): mask for mask in here}
    common = [(mask, by_point[str(mask.prompt)]) for mask in there if str(mask.prompt) in by_point]

    # a mask on the edge of a threshold may pass on one side only
    assert len(common) >= 0.98 * max(len(here), len(there))
    flips = sum(int((decode_counts(a.counts, a.size_hw) ^ decode_counts(b.counts, b.size_hw)).sum()) for a, b in common)
    assert flips <= 1e-6 * len(common) * image.shape[0] * image.shape[1] + 5


def test_fast_agrees_with_exact_on_what_sam_nano_was_trained_for() -> None:
    sam = load_sam_nano("cuda")
    agreement = []
    for seed in range(8):
        scene = draw_scene(seed)
        exact = automatic_masks(sam, scene.image, AutomaticParams(**MODELS["sam_nano"].defaults))
        params = AutomaticParams(**MODELS["sam_nano"].defaults, precision="fast")
        fast = automatic_masks(sam, scene.image, params, embedding=embed(sam, [scene.image], fast=True)[0])
        agreement.append(mean_iou(fast, rles(exact)))

    assert np.mean(agreement) >= 0.98


def test_the_fused_attention_gives_the_encoders_embedding(image: np.ndarray) -> None:
    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]().eval().requires_grad_(False).cuda()
    for name, parameter in sam.image_encoder.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    [expected] = embed(sam, [image])

    fuse_attention(sam)

    assert torch.allclose(embed(sam, [image])[0], expected, atol=1e-3)


def test_the_number_of_copies_to_the_host_does_not_follow_the_number_of_points(image: np.ndarray) -> None:
    sam = tiny_sam().cuda()
    [embedding] = embed(sam, [image])
    copies = []
    for points_per_side in (8, 8, 24):  # the first to warm up
        params = AutomaticParams(points_per_side=points_per_side, points_per_batch=16)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            assert automatic_masks(sam, image, params, embedding=embedding)
            torch.cuda.synchronize()
        copies.append(sum("DtoH" in event.name for event in profiler.events()))

    assert copies[1] == copies[2]
    # the masks; how many passed by predicted IoU, by stability and in suppression, how many runs there are; and what
    # SAM's prompt encoder asks
    assert copies[2] <= 16


@pytest.fixture
def _little_memory(vit_b: Sam) -> Iterator[None]:
    """Torch may take 1 GiB more than it has; the driver, which is asked for free memory, does not know of it."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + (1 << 30)) / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("_little_memory")
def test_out_of_memory_halves_the_points_at_once(
    vit_b: Sam, image: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    [embedding] = embed(vit_b, [image])
    params = AutomaticParams(**{**THRESHOLDS, "box_nms_thresh": 0.5})
    few = automatic_masks(vit_b, image, replace(params, points_per_batch=2), embedding=embedding)

    with caplog.at_level(logging.WARNING):
        many = automatic_masks(vit_b, image, replace(params, points_per_batch=64), embedding=embedding)

    assert any("out of memory with 64 prompts at once" in message for message in caplog.messages)
    assert mean_iou(many, rles(few)) >= 0.99


def test_prompts_are_answered_as_on_the_cpu() -> None:
    scene = draw_scene(0)
    height, width = scene.image.shape[:2]
    prompts = [Prompt(box_xyxy=(x, 10, x + width / 4, height - 10)) for x in np.linspace(0, width / 2, 9)]
    answers = []
    for device in ("cuda", "cpu"):
        sam = load_sam_nano(device)
        [embedding] = embed(sam, [scene.image])
        found = prompted_masks(sam, embedding, prompts, PromptParams(), size_hw=(height, width))
        answers.append([masks[0] for masks in found])

    pairs = [
        (decode_counts(a.counts, a.size_hw), decode_counts(b.counts, b.size_hw)) for a, b in zip(*answers, strict=True)
    ]
    assert sum(int((a ^ b).sum()) for a, b in pairs) <= 1e-4 * len(pairs) * height * width
