"""Times the mask engine against SamAutomaticMaskGenerator. Both take turns in one process. Agreement is shown too.

    python tests/benchmarks/engine.py                     every section, a table
    python tests/benchmarks/engine.py --json              one document, {"bars": [...]}
    python tests/benchmarks/engine.py --short             what CI runs: 16 x 16 points, a tiny encoder, nothing judged
    python tests/benchmarks/engine.py --section vit_b     one section
    python tests/benchmarks/engine.py --section gpu_vit_h on a CUDA device; skipped if there is none

Every section runs in a process of its own, with the C library's allocator as it is or tuned. Tuned means
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_: freed memory is kept, not mapped and faulted in again. Without that,
the reference spends more than half of its time in page faults. Times are CPU seconds: a busy machine does little harm.

No trained weights are needed. A planted decoder answers each point with an object of a drawn scene at three scales,
smooth inside and ragged at the border. It is tuned to the counts of ViT-H on dog.jpg in segment-anything-fast's
published trace: 68 % of the outputs pass predicted IoU 0.88, 42 % also stability 0.95, with about 1,440 runs each.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "testdata" / "photos_plain"
sys.path.insert(0, str(ROOT))

from workers.engine import sam as engine_sam  # noqa: E402
from workers.engine.automatic import automatic_masks, masks_by  # noqa: E402
from workers.engine.decoder import decode_points, prompt_logits  # noqa: E402
from workers.engine.device import default_device  # noqa: E402
from workers.engine.device_search import DeviceSearch  # noqa: E402
from workers.engine.folded_decoder import FoldedDecoder  # noqa: E402
from workers.engine.sam import promptable  # noqa: E402
from workers.images.decode import decode  # noqa: E402
from workers.models.files import is_present  # noqa: E402
from workers.models.fused_attention import fuse_attention  # noqa: E402
from workers.models.registry import MODELS, find_model, largest_present  # noqa: E402
from workers.models.sam import ARCHITECTURES, load_sam  # noqa: E402
from workers.params import AutomaticParams, automatic_params  # noqa: E402

TUNED = {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. bar: the limit it must hold, None if it is only shown."""

    name: str
    value: float
    bar: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def holds(self) -> bool:
        if self.bar is None:
            return True
        return self.value <= self.bar if self.at_most else self.value >= self.bar


class Scene(nn.Module):
    """Objects at three scales with ragged borders: the logits (3, low, low) and predicted IoUs of any point."""

    SCALES = (8, 36, 200)  # objects of each

    def __init__(self, prompt_encoder: PromptEncoder, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.low = prompt_encoder.mask_input_size[0]
        self._read_points_with(prompt_encoder)
        rows, columns = torch.meshgrid(torch.arange(self.low), torch.arange(self.low), indexing="ij")
        place = torch.stack([columns, rows]).float().add(0.5) / self.low
        place = place + 0.10 * self._noise(5, 2, random) + 0.022 * self._noise(64, 2, random)
        place = place + 0.010 * self._noise(self.low // 2, 2, random)
        self.objects, self.owner, self.iou = [], [], []
        for count in self.SCALES:
            centres = torch.rand(count, 2, generator=random)
            distance = (place[None] - centres[:, :, None, None]).norm(dim=1)
            nearest, owner = distance.topk(2, dim=0, largest=False)
            rival = torch.where(owner[0] == torch.arange(count)[:, None, None], nearest[1], nearest[0])
            unsteady = 0.034 * torch.exp(0.55 * torch.randn(count, generator=random))
            self.objects.append(self._with_stability(rival - distance, 1 - unsteady.clamp(max=0.4)))
            self.owner.append(owner[0])
            self.iou.append(0.912 + 0.045 * torch.randn(count, generator=random))
        self.ripples = 0.3 * self._noise(12, 16, random)
        waves = torch.arange(len(self.table))[:, None] * torch.tensor([12.9898, 78.233, 37.719])
        self.jitter = (waves.sin() * 43758.5453).frac().abs()

    def _apply(self, fn: Any, recurse: bool = True) -> Scene:
        """Buffers that move with the model and are not part of its weights."""
        for name in ("objects", "owner", "iou"):
            setattr(self, name, [fn(one) for one in getattr(self, name)])
        for name in ("table", "table_xy", "ripples", "jitter"):
            setattr(self, name, fn(getattr(self, name)))
        return super()._apply(fn, recurse)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, sparse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From sparse (n, tokens, channels), where the first token is a point's, to (n, 3, low, low) and (n, 3)."""
        cell = (sparse[:, 0] @ self.table.T).argmax(dim=1)
        x, y = self.table_xy[cell].unbind(1)
        jitter = self.jitter[cell]
        column, row = (x * self.low).long(), (y * self.low).long()
        logits, ious = [], []
        for scale, objects in enumerate(self.objects):
            number = self.owner[scale][row, column]
            ripple = self.ripples[(jitter[:, scale] * 15.99).long()]
            logits.append(objects[number] + ripple + (jitter[:, scale, None, None] - 0.5))
            ious.append(self.iou[scale][number] + 0.03 * (jitter[:, 2 - scale] - 0.5))
        return torch.stack(logits, 1), torch.stack(ious, 1)

    def _read_points_with(self, prompt_encoder: PromptEncoder) -> None:
        steps = (torch.arange(128) + 0.5) / 128
        self.table_xy = torch.cartesian_prod(steps, steps).flip(1)
        self.table = prompt_encoder.pe_layer._pe_encoding(self.table_xy) + prompt_encoder.point_embeddings[1].weight

    def _noise(self, size: int, channels: int, random: torch.Generator) -> torch.Tensor:
        coarse = torch.randn(1, channels, size, size, generator=random)
        return F.interpolate(coarse, (self.low, self.low), mode="bicubic", align_corners=False)[0]

    @staticmethod
    def _with_stability(margin: torch.Tensor, stability: torch.Tensor) -> torch.Tensor:
        """Scale each object's margin: its stability is pixels above 1 divided by pixels above -1. Flatten far away."""
        slope = torch.full_like(stability, 300.0)
        for _ in range(12):
            scaled = margin * slope[:, None, None]
            inner, outer = ((scaled > edge).sum((1, 2)).float().clamp(min=1) for edge in (1, -1))
            slope = slope * ((1 - inner / outer).clamp(min=1e-3) / (1 - stability)).clamp(0.3, 3)
        return 22 * torch.tanh(margin * slope[:, None, None] / 22)


class PlantedDecoder(nn.Module):
    """MaskDecoder's signature around a Scene. `real`, if given, runs first for its cost; its outputs are dropped."""

    def __init__(self, scene: Scene, real: MaskDecoder | None = None) -> None:
        super().__init__()
        self.scene, self.real = scene, real

    def forward(self, sparse_prompt_embeddings: torch.Tensor, **other: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.real is not None:
            self.real(sparse_prompt_embeddings=sparse_prompt_embeddings, **other)
        return self.scene(sparse_prompt_embeddings)


class PlantedFolded(FoldedDecoder):
    """The folded decoder is run for its cost. Its outputs are replaced by the scene's."""

    def __init__(self, planted: PlantedDecoder) -> None:
        super().__init__(planted.real)
        self.scene = planted.scene

    def attend(self, image, sparse):  # type: ignore[no-untyped-def]
        self.logits, iou = self.scene(sparse)
        return replace(super().attend(image, sparse), iou=torch.cat([iou[:, :1], iou], dim=1))

    def upscale(self, state, prompts, outputs, grid, used):  # type: ignore[no-untyped-def]
        real = super().upscale(state, prompts, outputs, grid, used)
        return self.logits[prompts][:, :, : 4 * used[0], : 4 * used[1]].to(real.dtype)


class Stopwatch:
    """CPU seconds spent in some modules of a model, measured by hooks. The rest is the post-processing."""

    def __init__(self, *modules: nn.Module) -> None:
        self.seconds, self._start = 0.0, 0.0
        for module in modules:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._start = time.process_time()

    def _end(self, *_: Any) -> None:
        self.seconds += time.process_time() - self._start


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Medians of CPU seconds, in all and without the model's modules, and how well the masks agree."""

    reference: float
    ours: float
    reference_post: float
    ours_post: float
    masks: int
    identical: int
    kept_by_both: bool

    def note(self) -> str:
        order = "same order" if self.kept_by_both else "another set or order"
        return f"{self.identical} of {self.masks} masks identical, {order}"


def tiny_sam(scene: bool = True, side_px: int = 1024) -> Sam:
    """SAM's geometry (1024 px, 64 x 64 embedding, 256 x 256 logits) with an encoder of two layers."""
    side = side_px // 16
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        depth=2, embed_dim=192, img_size=side_px, mlp_ratio=4, norm_layer=partial(nn.LayerNorm, eps=1e-6), num_heads=3,
        patch_size=16, qkv_bias=True, use_rel_pos=True, global_attn_indexes=(), window_size=14, out_chans=256,
    )  # fmt: skip
    prompts = PromptEncoder(
        embed_dim=256, image_embedding_size=(side, side), input_image_size=(side_px, side_px), mask_in_chans=16
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder: nn.Module = MaskDecoder(transformer_dim=256, transformer=transformer)
    if scene:
        decoder = PlantedDecoder(Scene(prompts))
    return Sam(encoder, prompts, decoder).eval().requires_grad_(False)


def photo(width: int, height: int) -> np.ndarray:
    """The truck of segment-anything's own notebooks, resized. Noise if the photos are not here."""
    path = PHOTOS / "sam_truck.jpg"
    if not path.exists():
        return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def compare(
    sam: Sam, image: np.ndarray, params: AutomaticParams, *, repeat: int, reference_batch: int = 64
) -> Compared:
    """Run both sides in turn, A B B A."""
    modules = Stopwatch(sam.image_encoder, sam.prompt_encoder, sam.mask_decoder)
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=params.points_per_side,
        points_per_batch=reference_batch,
        min_mask_region_area=params.min_mask_region_area,
        output_mode="coco_rle",
    )
    sides: list[Callable[[], Any]] = [lambda: generator.generate(image), lambda: automatic_masks(sam, image, params)]
    automatic_masks(sam, image, replace(params, points_per_side=2))  # tables and first touches are not counted
    spent: list[list[tuple[float, float]]] = [[], []]
    results: list[Any] = [None, None]
    for turn in range(repeat):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            start, before = time.process_time(), modules.seconds
            results[side] = sides[side]()
            total = time.process_time() - start
            spent[side].append((total, total - (modules.seconds - before)))
    theirs = [mask["segmentation"]["counts"] for mask in results[0]]
    ours = [mask.counts for mask in results[1]]
    medians = [[statistics.median(values) for values in zip(*side, strict=True)] for side in spent]
    return Compared(
        reference=medians[0][0],
        ours=medians[1][0],
        reference_post=medians[0][1],
        ours_post=medians[1][1],
        masks=len(theirs),
        identical=len(set(theirs) & set(ours)),
        kept_by_both=theirs == ours,
    )


def post_rows(what: str, compared: Compared, bar: float | None) -> list[Row]:
    ratio = compared.reference_post / compared.ours_post
    seconds = f"{compared.reference_post:.2f} s to {compared.ours_post:.2f} s"
    identical = float(compared.kept_by_both)
    return [
        Row(name=f"{what}: post-processing, times the reference", value=ratio, bar=bar, note=seconds),
        Row(name=f"{what}: bit-identical masks in the same order", value=identical, bar=1, note=compared.note()),
    ]


def section_short(repeat: int) -> list[Row]:
    compared = compare(tiny_sam(), photo(512, 342), AutomaticParams(points_per_side=16), repeat=1)
    return [replace(row, bar=None) for row in post_rows("512x342, 256 points, allocator as it is", compared, None)]


def section_counts(repeat: int) -> list[Row]:
    """The planted scene's counts, beside those of ViT-H on dog.jpg."""
    sam, image = tiny_sam(), photo(1024, 683)
    thresholds = {"outputs": (-1, -1), "pass IoU": (0.88, -1), "pass stability": (0.88, 0.95)}
    found = {}
    for name, (iou, stability) in thresholds.items():
        params = AutomaticParams(
            points_per_side=8, pred_iou_thresh=iou, stability_score_thresh=stability, box_nms_thresh=1
        )
        found[name] = automatic_masks(sam, image, params)
    every, stable = len(found["outputs"]), found["pass stability"]
    runs = statistics.mean(count_runs(mask.counts, mask.size_hw) for mask in stable)
    kept = len(automatic_masks(sam, image, AutomaticParams()))
    return [
        Row(name="planted: part with predicted IoU over 0.88", value=len(found["pass IoU"]) / every, note="ViT-H 0.68"),
        Row(name="planted: part with stability 0.95 too", value=len(stable) / every, note="ViT-H 0.42"),
        Row(name="planted: runs a mask", value=runs, note="ViT-H 1440"),
        Row(name="planted: masks kept of 1,024 points", value=kept, note="50 to 150 in photographs"),
    ]


def count_runs(counts: str, size_hw: tuple[int, int]) -> int:
    pixels = coco_mask.decode({"size": list(size_hw), "counts": counts.encode()}).T.ravel()
    return int(np.count_nonzero(np.diff(pixels))) + 1


def section_post_1mp(repeat: int) -> list[Row]:
    compared = compare(tiny_sam(), photo(1024, 683), AutomaticParams(), repeat=repeat)
    return post_rows("1024x683, 1,024 points, allocator as it is", compared, 40)


def section_post_1mp_tuned(repeat: int) -> list[Row]:
    compared = compare(tiny_sam(), photo(1024, 683), AutomaticParams(), repeat=repeat)
    return post_rows("1024x683, 1,024 points, allocator tuned", compared, 20)


def section_post_12mp_tuned(repeat: int) -> list[Row]:
    params = AutomaticParams(points_per_side=8, min_mask_region_area=100)
    compared = compare(tiny_sam(), photo(4000, 3000), params, repeat=repeat, reference_batch=8)
    return post_rows("12 MP, 64 points (reference 8 a batch), allocator tuned", compared, 20)


def section_memory(repeat: int) -> list[Row]:
    sam, image = tiny_sam(), photo(4000, 3000)
    start = time.process_time()
    masks = automatic_masks(sam, image, AutomaticParams(min_mask_region_area=100))
    note = f"{len(masks)} masks in {time.process_time() - start:.1f} CPU s, encoder included"
    return [Row(name="12 MP, 1,024 points: peak RSS, GB", value=peak_rss_gb(), bar=2.5, at_most=True, note=note)]


def plant(sam: Sam) -> None:
    """Run the decoder for its cost, folded on our side, and answer from the scene."""
    sam.mask_decoder = PlantedDecoder(Scene(sam.prompt_encoder), sam.mask_decoder)
    engine_sam.folds = lambda decoder, from_dim: True
    engine_sam.FoldedDecoder = PlantedFolded


def section_vit_b(repeat: int) -> list[Row]:
    """All steps with vit_b's cost: random weights, and the planted scene's outputs on both sides."""
    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]().eval().requires_grad_(False)
    plant(sam)
    compared = compare(sam, photo(1024, 683), AutomaticParams(), repeat=repeat)
    ratio = compared.reference / compared.ours
    seconds = f"{compared.reference:.1f} to {compared.ours:.1f} CPU s; {compared.note()}"
    return [Row(name="vit_b end to end, 1024x683, 1,024 points", value=ratio, bar=4, note=seconds)]


@torch.no_grad()
def section_prompts(repeat: int) -> list[Row]:
    """50 boxes of one image with vit_b's decoder, against a loop over SamPredictor.predict."""
    sam, image = tiny_sam(scene=False), photo(1024, 683)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    corners = np.random.default_rng(0).uniform(0, 600, (50, 2))
    boxes = np.concatenate([corners, corners + 80], axis=1)
    ratios, difference = [], 0.0
    for _ in range(repeat):
        start = time.process_time()
        theirs = [predictor.predict(box=box, multimask_output=False)[2] for box in boxes]
        middle = time.process_time()
        ours, _ = prompt_logits(sam, predictor.features, size_hw=image.shape[:2], boxes_xyxy=boxes, multimask=False)
        ratios.append((middle - start) / (time.process_time() - middle))
        difference = max(difference, float(np.abs(np.stack(theirs) - ours.numpy()).max()))
    note = f"largest difference of logits {difference:.1e}; without the masks' upsampling, which the loop pays"
    return [Row(name="50 boxes an image, times a SamPredictor loop", value=statistics.median(ratios), bar=5, note=note)]


@torch.no_grad()
def section_decoder(repeat: int) -> list[Row]:
    """SAM's decoder, folded and not folded: 64 points of one 1024 x 683 image."""
    sam = tiny_sam(scene=False)
    embedding = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0))
    points = np.random.default_rng(0).uniform(0, 600, (64, 2))
    ratios, flips, worst = [], 0, 0.0
    for _ in range(repeat):
        results = []
        seconds = []
        for fold in (False, True):
            engine_sam.folds = lambda decoder, from_dim, fold=fold: fold
            start = time.process_time()
            parts = decode_points(
                sam, embedding, points, size_hw=(683, 1024), at_once=64, least_iou=0, used_hw=(172, 256)
            )
            results.append(np.concatenate([part.logits[:, :, :172] for part in parts]))
            seconds.append(time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
        worst = float(np.abs(results[0] - results[1]).max() / np.abs(results[0]).max())
        flips = int(((results[0] > 0) != (results[1] > 0)).sum())
    note = f"worst difference {worst:.1e} of the largest logit, {flips} of {results[0].size} signs differ"
    return [Row(name="decoder alone, 64 points, times the reference", value=statistics.median(ratios), note=note)]


def section_nano(repeat: int) -> list[Row]:
    """sam_nano on the plain photos, against the reference generator with the same weights."""
    from workers.models.nano import load_sam_nano

    try:
        sam = load_sam_nano("cpu")
    except (OSError, ValueError) as error:
        return [Row(name="sam_nano on photos_plain", value=float("nan"), note=f"not run: {error}")]
    params = AutomaticParams(**MODELS["sam_nano"].defaults)
    generator = SamAutomaticMaskGenerator(sam, **MODELS["sam_nano"].defaults, output_mode="coco_rle")
    seconds, same, masks, images = [0.0, 0.0], 0, 0, 0
    for path in sorted(PHOTOS.glob("*.jpg")):
        image = np.asarray(Image.open(path).convert("RGB"))
        start = time.process_time()
        theirs = [mask["segmentation"]["counts"] for mask in generator.generate(image)]
        middle = time.process_time()
        ours = [mask.counts for mask in automatic_masks(sam, image, params)]
        seconds = [seconds[0] + middle - start, seconds[1] + time.process_time() - middle]
        same, masks, images = same + (theirs == ours), masks + len(theirs), images + 1
    if images == 0:
        return [Row(name="sam_nano on photos_plain", value=float("nan"), note="not run: no photos here")]
    note = f"{images / seconds[0]:.2f} to {images / seconds[1]:.2f} images a CPU second, {masks} masks"
    return [
        Row(name="sam_nano on photos_plain, times the reference", value=seconds[0] / seconds[1], note=note),
        Row(name="sam_nano: photos with identical masks in order", value=same / images, bar=1, note=f"{images} photos"),
    ]


# ------------------------------------------------------------------------------------------------------- on a GPU

SIDES = ("reference, float32", "reference, autocast", "exact", "fast")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to the masks of an image. seconds: medians of wall time; masks: (COCO RLE, ...)."""

    seconds: float
    peak_gb: float
    busy: float
    copies: float
    masks: list[dict[str, Any]]


def section_fast(repeat: int) -> list[Row]:
    """precision=fast beside exact on the annotated photos, with the device search. On a CPU with sam_nano, on a GPU
    with the largest official model that was pulled."""
    device = default_device()
    spec = MODELS["sam_nano"] if device == "cpu" else largest_present()
    sam = load_sam(spec, ARCHITECTURES[spec.name], device)
    asked = [automatic_params(spec.defaults, {"precision": precision}) for precision in ("exact", "fast")]
    best_truth: list[list[float]] = [[], []]
    agreement: list[float] = []
    for image, truth in annotated_photos():
        found = [find_by_device(sam, image, params) for params in asked]
        agreement += best_ious(found[1], found[0])
        for ious, masks in zip(best_truth, found, strict=True):
            ious += best_ious(masks, truth)
    if not best_truth[0]:
        return [Row(name="fast on photos_masks", value=float("nan"), note="not run: no photos here")]
    what = f"fast, {spec.name} on {device}"
    rows = [Row(name=f"{what}: mean IoU of matched masks", value=statistics.mean(agreement), bar=0.98)]
    for least in (0.5, 0.75):
        exact, fast = (100 * statistics.mean(iou >= least for iou in ious) for ious in best_truth)
        note = f"{exact:.2f} to {fast:.2f} % of {len(best_truth[0])} objects, {len(agreement)} masks"
        name = f"{what}: points of recall lost at IoU {least}"
        rows.append(Row(name=name, value=exact - fast, bar=0.2, at_most=True, note=note))
    return rows


def annotated_photos() -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Images (H, W, 3) with the COCO RLE of the objects that people marked in them."""
    for path in sorted(PHOTOS.with_name("photos_masks").glob("*/ground_truth.json")):
        document = json.loads(path.read_text())
        for entry in document["images"]:
            content = (path.parent / document["image_dir"] / entry["file_name"]).read_bytes()
            truth = [instance["segmentation"] for instance in entry["instances"]]
            yield decode(content, name=entry["file_name"]), truth


def find_by_device(sam: Sam, image: np.ndarray, params: AutomaticParams) -> list[dict[str, Any]]:
    is_fast = params.precision == "fast"
    model = promptable(sam, **({"fold_from_dim": 0} if is_fast else {}))
    [embedding] = model.embed([image], fast=is_fast)
    masks = masks_by(DeviceSearch, model, image, params, embedding)
    return [{"size": list(mask.size_hw), "counts": mask.counts} for mask in masks]


def best_ious(masks: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[float]:
    """The IoU of each of the reference's masks with the best of these, 0 if there is none."""
    if not masks or not reference:
        return [0.0] * len(reference)
    best: list[float] = coco_mask.iou(masks, reference, [0] * len(reference)).max(axis=0).tolist()
    return best


def section_gpu(name: str, repeat: int) -> list[Row]:
    """Whole images on a CUDA device: with the official weights if they were pulled, else random ones and the scene."""
    if not torch.cuda.is_available():
        return [Row(name=f"GPU, {name}", value=float("nan"), note="skipped, no CUDA device")]
    spec = find_model(f"sam_{name}")
    if is_present(spec):
        sam = load_sam(spec, ARCHITECTURES[spec.name], "cpu")
    else:
        torch.manual_seed(0)
        sam = sam_model_registry[name]().eval().requires_grad_(False)
        plant(sam)
    weights = "official weights" if is_present(spec) else "random weights, planted scene"
    what = f"{name}, {torch.cuda.get_device_name()}, {weights}"
    return gpu_rows(what, sam.cuda(), photo(1024, 683), AutomaticParams(), repeat=repeat)


def gpu_rows(
    what: str, sam: Sam, image: np.ndarray, params: AutomaticParams, *, repeat: int, matmul: int = 8192
) -> list[Row]:
    """Our device search against the reference's generator, on the device of `sam`."""
    fused = copy.deepcopy(sam)
    fuse_attention(fused)
    flops = count_flops(lambda: masks_by(DeviceSearch, promptable(sam), image, params))
    floor = flops / matmul_rate(sam.device, matmul)
    sides = dict(zip(SIDES, time_sides(sam, fused, image, params, repeat), strict=True))
    reference, fast = sides["reference, float32"], sides["fast"]
    rows = [side_row(what, name, side, reference) for name, side in sides.items()]
    floor_note = f"{flops / 1e12:.2f} TFLOP at the bfloat16 rate of a large product: {floor * 1e3:.1f} ms"
    return [
        *rows,
        Row(name=f"{what}: fast, times the floor", value=fast.seconds / floor, bar=3, at_most=True, note=floor_note),
        Row(name=f"{what}: fast, mean IoU of matched masks", value=mean_iou(fast, sides["exact"]), bar=0.98),
        Row(name=f"{what}: exact, mean IoU of matched masks", value=mean_iou(sides["exact"], reference)),
    ]


def side_row(what: str, name: str, side: Side, reference: Side) -> Row:
    known = {mask["counts"] for mask in reference.masks}
    same = sum(mask["counts"] in known for mask in side.masks)
    note = (
        f"{1 / side.seconds:.2f} images/s, device busy {side.busy:.0%}, peak {side.peak_gb:.1f} GB, "
        f"{side.copies:.0f} copies from the device, {same} of {len(reference.masks)} masks identical"
    )
    bar = {"exact": 3.5, "fast": 15.0}.get(name)
    return Row(name=f"{what}: {name}, times the reference", value=reference.seconds / side.seconds, bar=bar, note=note)


def time_sides(sam: Sam, fused: Sam, image: np.ndarray, params: AutomaticParams, repeat: int) -> list[Side]:
    """The four SIDES in turn, after one turn of each that is not counted."""
    generator = SamAutomaticMaskGenerator(sam, points_per_side=params.points_per_side, output_mode="coco_rle")

    def reference(is_fast: bool) -> list[dict[str, Any]]:
        with torch.autocast(sam.device.type, dtype=torch.bfloat16, enabled=is_fast):
            return [mask["segmentation"] for mask in generator.generate(image)]

    def ours(precision: str) -> list[dict[str, Any]]:
        masks = masks_by(DeviceSearch, promptable(fused), image, replace(params, precision=precision))
        return [{"size": list(mask.size_hw), "counts": mask.counts} for mask in masks]

    runs = [partial(reference, False), partial(reference, True), partial(ours, "exact"), partial(ours, "fast")]
    masks = [run() for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    peaks = [0.0 for _ in runs]
    for turn in range(repeat):
        for number in range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs))):
            spent, peak = timed(runs[number], sam.device)
            seconds[number].append(spent)
            peaks[number] = max(peaks[number], peak)
    sides = []
    for run, spent, peak, found in zip(runs, map(statistics.median, seconds), peaks, masks, strict=True):
        busy_seconds, copies = device_work(run, sam.device)
        sides.append(Side(seconds=spent, peak_gb=peak, busy=busy_seconds / spent, copies=copies, masks=found))
    return sides


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(seconds of wall time until the device is done, GB of its memory at the peak)"""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / 1e9


def device_work(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(seconds in which the device worked, copies from it to the host), under torch's profiler."""
    if device.type != "cuda":
        return float("nan"), float("nan")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, until = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6, sum("DtoH" in event.name for event in events)


def count_flops(run: Callable[[], Any]) -> int:
    """Operations of the matrix products and convolutions. Each multiplication and each addition counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def matmul_rate(device: torch.device, size: int) -> float:
    """Operations a second of a square bfloat16 product."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [timed(lambda: [left @ right for _ in range(10)], device)[0] for _ in range(4)]
    return 10 * 2 * size**3 / min(seconds)


def mean_iou(side: Side, reference: Side) -> float:
    """The IoU of each of the reference's masks with the best of this side's."""
    return statistics.mean(best_ious(side.masks, reference.masks)) if reference.masks else float("nan")


SECTIONS: dict[str, tuple[Callable[[int], list[Row]], bool]] = {
    # name: (section, whether its allocator is tuned)
    "counts": (section_counts, False),
    "post_1mp": (section_post_1mp, False),
    "post_1mp_tuned": (section_post_1mp_tuned, True),
    "post_12mp_tuned": (section_post_12mp_tuned, True),
    "memory": (section_memory, False),
    "decoder": (section_decoder, False),
    "prompts": (section_prompts, False),
    "vit_b": (section_vit_b, False),
    "nano": (section_nano, False),
    "fast": (section_fast, False),
    "gpu_vit_h": (partial(section_gpu, "vit_h"), False),
    "gpu_vit_l": (partial(section_gpu, "vit_l"), False),
    "gpu_vit_b": (partial(section_gpu, "vit_b"), False),
}


def peak_rss_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_section(name: str, repeat: int) -> list[Row]:
    """Run a section in a process of its own, with its allocator."""
    environment = os.environ | (TUNED if SECTIONS[name][1] else {})
    command = [sys.executable, __file__, "--child", name, "--repeat", str(repeat)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def show(rows: list[Row]) -> None:
    for row in rows:
        verdict = f"{'at most' if row.at_most else 'bar'} {row.bar} {'holds' if row.holds else 'FAILS'}"
        print(f"{row.name:66} {row.value:8.2f}  {'' if row.bar is None else verdict:20} {row.note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--short", action="store_true", help="the form for CI: shows a ratio, judges nothing")
    parser.add_argument("--section", action="append", choices=sorted(SECTIONS), help="only this one (repeatable)")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each side; the medians count")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument("--child", choices=sorted(SECTIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps([asdict(row) for row in SECTIONS[args.child][0](args.repeat)]))
        return
    rows: list[Row] = []
    for name in [] if args.short else args.section or SECTIONS:
        found = run_section(name, args.repeat)
        rows += found
        if not args.json:
            show(found)
    if args.short:
        rows = section_short(1)
    if args.json:
        values = [None if np.isnan(row.value) else row.value for row in rows]  # JSON knows no NaN
        bars = [
            {"name": row.name, "value": value, "bar": row.bar, "holds": row.holds, "note": row.note}
            for row, value in zip(rows, values, strict=True)
        ]
        print(json.dumps({"bars": bars}))
    elif args.short:
        show(rows)


if __name__ == "__main__":
    main()
