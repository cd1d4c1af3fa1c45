"""The search that a GPU takes, here on the CPU's tensors, against the CPU's own, which is the reference's to the bit.

SAM's prompt encoder rounds one point otherwise than many, and the device search encodes all points at once; so the
planted scenes, which tell prompts apart by their bits, are asked with all points at once on the other side too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.pixels import decode_counts
from tests.unit.test_automatic import CPU_BOUND, make_image, make_sam, parameters, reference_masks, sizes
from workers.engine import decoder, device_runs, device_search
from workers.engine.automatic import CropSearch, ModelOutputError, automatic_masks, masks_by
from workers.engine.boxed_runs import take_runs
from workers.engine.decoder import BYTES_A_LOGIT, prompt_logits, prompts_that_fit
from workers.engine.device import DeviceFault, device_fault
from workers.engine.device_runs import DeviceMasks, read_runs
from workers.engine.device_search import DeviceSearch
from workers.engine.prompted import _masks_on_cpu, _masks_on_device
from workers.engine.sam import promptable
from workers.engine.upsampling import Upsampling
from workers.masks import Mask
from workers.models.fused_attention import fuse_attention
from workers.models.sam2 import Hiera, Sam2
from workers.models.sam_hq import build_sam_hq
from workers.params import AutomaticParams

ALL_AT_ONCE = 10_000
EVERYTHING = AutomaticParams(points_per_side=4, pred_iou_thresh=-9.0, stability_score_thresh=0.0, box_nms_thresh=0.9)
A_PIXEL_ON_A_THRESHOLD = AutomaticParams(
    points_per_side=4,
    points_per_batch=4,
    pred_iou_thresh=0.9,
    stability_score_thresh=0.95,
    stability_score_offset=-0.5,
    box_nms_thresh=1.0,
    crop_nms_thresh=1.0,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]  # slow: models are built


@pytest.fixture(autouse=True)
def _nothing_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_found_to_fit", {})


def by_device(sam: Any, image: np.ndarray, params: AutomaticParams, **other: Any) -> list[Mask]:
    return masks_by(DeviceSearch, promptable(sam, **other), image, params)


def by_cpu(sam: Any, image: np.ndarray, params: AutomaticParams, **other: Any) -> list[Mask]:
    return masks_by(CropSearch, promptable(sam, **other), image, params)


@given(size=sizes, params=parameters, seed=..., tied=...)
@example(size=(128, 96), params=AutomaticParams(points_per_side=6), seed=0, tied=False)
@example(size=(90, 130), params=AutomaticParams(points_per_side=5, crop_n_layers=1), seed=3, tied=True)
@example(size=(300, 200), params=A_PIXEL_ON_A_THRESHOLD, seed=5, tied=False)
@settings(CPU_BOUND, max_examples=20)
def test_the_device_search_finds_the_same_masks_in_the_same_order(
    size: tuple[int, int], params: AutomaticParams, seed: int, tied: bool
) -> None:
    sam, image = make_sam(seed=seed % 6, tied=tied), make_image(*size, seed % 6)

    found = by_device(sam, image, params)

    expected = by_cpu(sam, image, replace(params, points_per_batch=ALL_AT_ONCE))
    assert [untold(mask) for mask in found] == [untold(mask) for mask in expected]
    # torch's bilinear kernel rounds one way or another, by the shape of what it gets: a pixel may be on either side.
    assert [mask.stability_score for mask in found] == [
        mask.stability_score and pytest.approx(mask.stability_score, rel=2 / max(mask.area_px, 1)) for mask in expected
    ]


def untold(mask: Mask) -> Mask:
    return replace(mask, stability_score=None)


def test_rounds_and_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sam, image = make_sam(tied=True), make_image(120, 90)
    params = AutomaticParams(points_per_side=6, pred_iou_thresh=0.85, stability_score_thresh=0.6, points_per_batch=4)
    expected = by_cpu(sam, image, replace(params, points_per_batch=ALL_AT_ONCE))

    monkeypatch.setattr(device_search, "POINTS_HELD", 7)
    monkeypatch.setattr(device_runs, "GROUP_BYTES", 1)

    assert len(expected) >= 3
    assert by_device(sam, image, params) == expected


@pytest.mark.slow
def test_equal_scores_keep_the_references_order_beyond_a_thousand_candidates() -> None:
    sam, image = make_sam(tied=True), make_image(24, 24)
    params = AutomaticParams(
        points_per_side=19, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=0.9, points_per_batch=400
    )

    ours = [(mask.counts, mask.predicted_iou) for mask in by_device(sam, image, params)]

    assert ours == [(counts, iou) for counts, _, _, iou, _, _ in reference_masks(sam, image, params)]


def make_narrow() -> Sam:
    return make_sam(planted=False, dim=32, seed=3)


def make_wide() -> Sam:
    return make_sam(planted=False, dim=256, seed=3)


def make_sam_hq() -> Sam:
    sam = build_sam_hq(width=16, depth=3, heads=2, global_blocks=(1, 2), image_px=128, channels=32, window=3)
    return with_drawn_weights(sam)


def make_sam2() -> nn.Module:
    pytest.importorskip("transformers")
    hiera = Hiera(
        width=16, heads=1, blocks=(1, 1, 2, 1), global_blocks=(3,), windows=(8, 4, 4, 2), image_px=128, channels=32
    )
    return with_drawn_weights(Sam2(hiera))


def with_drawn_weights(model: nn.Module) -> Any:
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            around = 1 if "norm" in name and name.endswith("weight") else 0
            weight.copy_(around + 0.2 * torch.randn(weight.shape, generator=random))
    return model.eval().requires_grad_(False)


FAMILIES = [make_narrow, make_wide, make_sam_hq, make_sam2]


@pytest.mark.parametrize("make", FAMILIES)
def test_a_real_decoder_gives_the_same_masks_up_to_single_pixels(make: Callable[[], Any]) -> None:
    model, image = make(), make_image(90, 128)

    ours, theirs = by_device(model, image, replace(EVERYTHING, points_per_batch=5)), by_cpu(model, image, EVERYTHING)

    assert len(ours) > 0
    assert [mask.prompt for mask in ours] == [mask.prompt for mask in theirs]
    assert np.allclose([mask.predicted_iou for mask in ours], [mask.predicted_iou for mask in theirs], atol=1e-5)
    pixels = [[decode_counts(mask.counts, (90, 128)) for mask in masks] for masks in (ours, theirs)]
    assert sum(int((a ^ b).sum()) for a, b in zip(*pixels, strict=True)) <= 5


@pytest.mark.parametrize("make", FAMILIES)
def test_fast_predicts_ious_in_float32_and_finds_much_the_same(make: Callable[[], Any]) -> None:
    model, image = make(), make_image(90, 128)
    params = replace(EVERYTHING, box_nms_thresh=1.0)

    exact = automatic_masks(model, image, params)
    fast = by_device(model, image, replace(params, precision="fast"), fold_from_dim=0)

    ious = torch.tensor([mask.predicted_iou for mask in fast], dtype=torch.float32)
    assert (ious != ious.bfloat16().float()).float().mean() > 0.9
    assert mean_best_iou(fast, exact) > 0.9


def mean_best_iou(masks: list[Mask], reference: list[Mask]) -> float:
    ours, theirs = (
        [{"size": mask.size_hw, "counts": mask.counts.encode()} for mask in some] for some in (masks, reference)
    )
    return float(coco_mask.iou(ours, theirs, [0] * len(theirs)).max(axis=0).mean())


def move_to_pretended_gpu(model: nn.Module) -> None:
    """Under FakeTensorMode: tensors of a CUDA device without values, with which nothing can be asked of it."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    held[name] = nn.Parameter(moved, requires_grad=False) if held is module._parameters else moved


class Copies(TorchDispatchMode):
    """The operations that take tensors of one device and give one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        devices = {one.device.type for one in tree_leaves((args, kwargs, given)) if isinstance(one, torch.Tensor)}
        if len(devices) > 1:
            self.seen.append(str(func))
        return given


@pytest.mark.slow
@pytest.mark.parametrize("make", FAMILIES)
def test_decoding_and_scoring_on_a_gpu_wait_for_nothing(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "free_bytes", lambda device: 1 << 40)  # the driver's to say, and there is none
    model = make()
    with torch.no_grad(), FakeTensorMode():
        move_to_pretended_gpu(model)
        width = 256 if make is make_wide else 32
        if make is make_sam2:
            embedding: Any = [torch.empty(1, *shape, device="cuda") for shape in ((4, 32, 32), (8, 16, 16), (32, 8, 8))]
        else:
            fuse_attention(model)
            embedding = model.image_encoder(torch.empty(2, 3, 128, 128, device="cuda"))[:1]
        search = DeviceSearch(
            promptable(model), replace(EVERYTHING, points_per_batch=7), crop=(0, 0, 128, 90), size_hw=(90, 128)
        )
        decode = search.model.decoder(embedding)
        with Copies() as copies:
            ious, logits = search._decode(decode, torch.empty(16, 2, width, device="cuda"))
            scores = search.device_masks.score(logits.flatten(0, 1), 1.0)

    # a value asked of the device, or a size that depends on one, would have been an error
    assert {one.device.type for one in (ious, logits, scores.boxes, scores.stability)} == {"cuda"}
    assert copies.seen == []


@pytest.mark.parametrize("broken", ["iou", "logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinity_is_an_error_that_says_where(broken: str, value: float) -> None:
    sam = make_sam()
    (sam.mask_decoder.iou if broken == "iou" else sam.mask_decoder.bank[:, 3, 3]).fill_(value)
    what = "predicted IoUs" if broken == "iou" else "mask logits"

    with pytest.raises(ModelOutputError, match=f"{what} hold NaN or infinity"):
        by_device(sam, make_image(100, 100), AutomaticParams(points_per_side=2, pred_iou_thresh=0.0))


def test_no_points_give_no_masks() -> None:
    assert by_device(make_sam(), make_image(30, 30), AutomaticParams(point_grids=((),))) == []


class TooSmallDevice(nn.Module):
    """A decoder that runs out of memory with more than so many prompts; it notes how many it was given."""

    def __init__(self, planted: nn.Module, most: int) -> None:
        super().__init__()
        self.planted, self.most = planted, most
        self.given: list[int] = []

    def forward(self, sparse_prompt_embeddings: torch.Tensor, **other: Any) -> Any:
        self.given.append(len(sparse_prompt_embeddings))
        if len(sparse_prompt_embeddings) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return self.planted(sparse_prompt_embeddings=sparse_prompt_embeddings, **other)


def test_out_of_memory_halves_the_points_at_once_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    sam, image = make_sam(), make_image(100, 80)
    params = AutomaticParams(points_per_side=6, pred_iou_thresh=0.85, stability_score_thresh=0.6, points_per_batch=18)
    expected = by_cpu(sam, image, replace(params, points_per_batch=ALL_AT_ONCE))
    sam.mask_decoder = TooSmallDevice(sam.mask_decoder, most=9)

    with caplog.at_level(logging.WARNING):
        found = [by_device(sam, image, params) for _ in range(2)]

    assert found == [expected] * 2
    assert sam.mask_decoder.given == [18] + [9] * 8
    [said] = caplog.messages
    assert "out of memory with 18 prompts at once, 9 from now on" in said


def test_a_point_that_does_not_fit_alone_is_the_devices_error() -> None:
    sam = make_sam()
    sam.mask_decoder = TooSmallDevice(sam.mask_decoder, most=0)

    with pytest.raises(torch.cuda.OutOfMemoryError):
        by_device(sam, make_image(100, 80), AutomaticParams(points_per_side=4))

    assert sam.mask_decoder.given == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("CUDA out of memory. Tried to allocate 1.00 GiB", DeviceFault.OUT_OF_MEMORY),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", DeviceFault.OUT_OF_MEMORY),
        ("CUDA failure 2: out of memory ; GPU=0", DeviceFault.OUT_OF_MEMORY),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", DeviceFault.OUT_OF_MEMORY),
        ("CUDA error: an illegal memory access was encountered", DeviceFault.LOST),
        ("CUDA driver error: an illegal memory access was encountered", DeviceFault.LOST),
        ("shapes do not fit", None),
    ],
)
def test_a_full_device_is_known_by_the_words_of_torch_the_driver_and_onnxruntime(
    said: str, fault: DeviceFault | None
) -> None:
    assert device_fault(RuntimeError(said)) is fault


def test_another_error_of_the_decoder_is_not_tried_again() -> None:
    class Broken(nn.Module):
        def forward(self, **_: Any) -> Any:
            raise RuntimeError("shapes do not fit")

    sam = make_sam()
    sam.mask_decoder = Broken()

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        by_device(sam, make_image(100, 80), AutomaticParams(points_per_side=4))


def test_batches_have_one_shape_and_leave_little_to_fill_up() -> None:
    sam = make_sam()
    sam.mask_decoder = TooSmallDevice(sam.mask_decoder, most=1000)

    by_device(sam, make_image(100, 80), AutomaticParams(points_per_side=5, points_per_batch=12))

    assert sam.mask_decoder.given == [9, 9, 9]  # of 25 points


def test_prompts_that_fit_follow_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = promptable(make_sam())
    each = BYTES_A_LOGIT * model.low_hw[0] * model.low_hw[1]
    fits = []
    for free in (0, 10 * each, 1000 * each):
        monkeypatch.setattr(decoder, "free_bytes", lambda device, free=free: free)
        fits.append(prompts_that_fit(model, 64))

    assert fits == [1, 5, 64]


@pytest.mark.parametrize("size_hw", [(60, 90), (1, 40), (200, 31)])
def test_masks_of_prompts_on_a_device_equal_those_made_one_by_one(size_hw: tuple[int, int]) -> None:
    sam = make_sam()
    model = promptable(sam)
    [embedding] = model.embed([make_image(*size_hw)], fast=False)
    boxes = np.random.default_rng(0).uniform(0, 30, (7, 4))
    logits, ious = prompt_logits(sam, embedding, size_hw=size_hw, boxes_xyxy=boxes, multimask=True)
    masks = (logits - 6).flatten(0, 1)  # some without a pixel

    here, there = (
        masks_of(model.upsampling(size_hw), model.mask_threshold, masks, ious.flatten())
        for masks_of in (_masks_on_cpu, _masks_on_device)
    )

    assert [asdict(runs) for runs in there[0]] == [asdict(runs) for runs in here[0]]
    assert there[1] == here[1]


def asdict(runs: Any) -> dict[str, Any]:
    return {"box": runs.box, "area_px": runs.area_px, "changes": runs.changes.tolist()}


def test_runs_of_many_masks_are_those_that_each_gives_alone() -> None:
    random = np.random.default_rng(0)
    pixels = random.random((9, 17, 17)) < np.linspace(0, 1, 9)[:, None, None]
    as_they_are = Upsampling(low_hw=(17, 17), mid=17, inside_hw=(13, 17), frame_hw=(13, 17))
    device_masks = DeviceMasks(upsampling=as_they_are, threshold=0.0)

    found = read_runs(device_masks.changes(torch.from_numpy(pixels).float()).numpy(), 9, (13, 17))

    alone = [take_runs(np.ascontiguousarray(one[:13].T), (0, 0)) for one in pixels]
    assert [asdict(runs) for runs in found] == [asdict(runs) for runs in alone]
