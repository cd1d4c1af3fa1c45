"""SAM 2.1 through its official files' layout, against Meta's numbers and transformers' own pipeline."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from PIL import Image, ImageOps
from segment_anything.utils.amg import build_point_grid, generate_crop_boxes, is_box_near_crop_edge
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, masks_to_boxes

from tests.pixels import decode_counts
from tests.unit import test_automatic
from tests.unit.test_models import Payload, make_spec
from workers.engine.decoder import prompt_logits
from workers.engine.upsampling import Upsampling
from workers.images.decode import decode
from workers.images.pixels import RgbImage
from workers.masks import BoolMask, Mask
from workers.models import nano, sam2
from workers.models.loading import load_model
from workers.models.registry import MODELS, find_model
from workers.models.sam import SamModel
from workers.models.sam2 import VARIANTS, Hiera, Sam2, load_variant
from workers.models.spec import MissingLibraryError, ModelSpec, WeightsError
from workers.params import AutomaticParams, PromptParams
from workers.prompts import Prompt, asks_one_point

transformers = pytest.importorskip("transformers")

TINY = Hiera(
    width=16, heads=1, blocks=(1, 1, 2, 1), global_blocks=(3,), windows=(8, 4, 4, 2), image_px=128, channels=32
)
# What a file of any size holds besides the tensors for images; some of them follow.
VIDEO_TENSORS, VIDEO_VALUES = 160, 7_521_777
VIDEO_MEMORY = {
    "memory_attention.layers.0.self_attn.q_proj.weight": (256, 256),
    "memory_encoder.mask_downsampler.encoder.0.weight": (4, 1, 3, 3),
    "maskmem_tpos_enc": (7, 1, 1, 64),
    "mask_downsample.weight": (1, 1, 4, 4),
    "no_mem_pos_enc": (1, 1, 256),
    "no_obj_embed_spatial": (1, 64),
    "no_obj_ptr": (1, 256),
    "obj_ptr_proj.layers.0.weight": (256, 256),
    "obj_ptr_tpos_proj.weight": (64, 256),
}
PROMPTS = [
    Prompt(box_xyxy=(10, 10, 60, 70)),
    Prompt(points=((20.5, 30, 1),)),
    Prompt(points=((20, 30, 1), (50, 50, 0))),
    Prompt(box_xyxy=(3.5, 4, 90, 88), points=((20, 30, 1), (50, 50, 0))),
    Prompt(box_xyxy=(0, 0, 30, 41)),
]
# Prompt, whether for several masks, predicted IoUs, every fourth logit of row 10 of the first mask.
RECORDED = [
    (PROMPTS[0], False, [0.59032], [0.02404, -0.01868, -0.00821, 0.00598, -0.00247, -0.00356, 0.13574, -0.2044]),
    (
        PROMPTS[1],
        True,
        [0.00573, 0.42301, 0.73477],
        [-0.06083, 0.07883, -0.07055, -0.00632, 0.0848, 0.01837, -0.18838, -0.28981],
    ),
    (PROMPTS[2], False, [0.727], [0.02496, -0.02421, -0.01399, 0.00631, -0.01264, -0.00137, 0.15343, -0.05194]),
    (PROMPTS[3], False, [0.70978], [0.02269, -0.01844, -0.02005, 0.00642, -0.01135, -0.00148, 0.16235, -0.0345]),
]


pytestmark = [pytest.mark.usefixtures("one_thread", "folder"), pytest.mark.slow]  # slow: models are built


def shapes_of(hiera: Hiera) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Sam2(hiera).state_dict().items()}


def draw_weights(hiera: Hiera = TINY, steepness: float = 1.0) -> dict[str, Tensor]:
    """Weights by the authors' names, the same on every machine. steepness multiplies the mask logits."""
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in sorted(shapes_of(hiera).items()):
        values = random.standard_normal(shape, np.float32)
        if "positional_encoding" not in name:
            values = 1 + values * 0.2 if "norm" in name and name.endswith("weight") else values * 0.15
        if "output_hypernetworks" in name and "layers.2" in name:
            values = values * steepness
        weights[name] = torch.from_numpy(np.asarray(values, np.float32))
    return weights


def save(folder: Path, weights: dict[str, Any], name: str = "sam2.1_hiera_tiny.pt") -> ModelSpec:
    """Save weights as Meta does, with the video's, and return the spec of just this file."""
    video = {name: torch.ones(shape) for name, shape in VIDEO_MEMORY.items()}
    torch.save({"model": weights | video}, folder / name)
    return make_spec(folder / name, name="sam2.1_tiny", loader="workers.models.sam2:load", family="sam2.1")


def load_tiny(folder: Path, weights: dict[str, Tensor]) -> SamModel:
    model = load_variant(save(folder, weights), TINY, "cpu")
    assert isinstance(model, SamModel)
    return model


def phone_picture(width: int = 96, height: int = 131) -> bytes:
    """A JPEG that stands upright at width x height and is stored on its side."""
    pixels = np.random.default_rng(2).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(content, "JPEG", exif=exif, quality=95)
    return content.getvalue()


# The official files, without the files


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("sam2.1_tiny", "3a16c5970bec9d88d952f6db866babf0b28fb8c4ae89d782dc646780fdbc5730"),
        ("sam2.1_small", "d967acdccefdd37f66bfe771f220a3298ad10f93d3e70e7efc2bdef0b677f10f"),
        ("sam2.1_base_plus", "eb5f10e0e390cd916e5b84a8ca53f52d352048635ca616323e4f8f2422d73f3a"),
        ("sam2.1_large", "647fd0a0125043d7047776c9789c4b78a00510abeb5af07ebca7ec6b7ace80d5"),
    ],
)
def test_names_and_shapes_are_those_of_the_authors_modules(name: str, digest: str) -> None:
    """digest: of the names and shapes that facebookresearch/sam2 at 2b90b9f builds from its own configuration."""
    shapes = shapes_of(VARIANTS[name])

    assert hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest() == digest
    width = VARIANTS[name].width
    assert shapes["image_encoder.trunk.patch_embed.proj.weight"] == (width, 3, 7, 7)
    assert shapes["image_encoder.neck.convs.0.conv.weight"] == (256, 8 * width, 1, 1)
    assert shapes["sam_prompt_encoder.point_embeddings.3.weight"] == (1, 256)
    assert shapes["sam_mask_decoder.transformer.layers.1.mlp.layers.1.weight"] == (256, 2048)
    assert not any(key.startswith(tuple(VIDEO_MEMORY)) for key in shapes)


@pytest.mark.parametrize("name", VARIANTS)
def test_architecture_and_video_memory_account_for_every_byte_of_the_official_file(name: str) -> None:
    with torch.device("meta"):
        sam = Sam2(VARIANTS[name])
    state = sam.state_dict()
    values = sum(tensor.numel() for tensor in state.values()) + VIDEO_VALUES

    # A torch archive adds a header, padding, a directory entry and a pickled record to each tensor.
    overhead = find_model(name).size_bytes - 4 * values
    assert overhead / (len(state) + VIDEO_TENSORS) == pytest.approx(331, abs=4)
    assert find_model(name).parameter_count == sum(parameter.numel() for parameter in sam.parameters())


# The loader


def test_official_layout_gives_a_frozen_float32_model_without_the_videos_memory(folder: Path) -> None:
    weights = draw_weights()

    sam = load_tiny(folder, weights).sam

    state = sam.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state.items())
    assert not sam.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in sam.parameters())


def test_named_variant_is_loaded_through_the_registry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "sam2.1_tiny", TINY)
    spec = save(folder, draw_weights())

    model = load_model(spec, "cpu")

    assert len(model.embed([decode(phone_picture(), name="phone.jpg")])) == 1


def test_one_variants_file_in_anothers_place_is_named_with_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "sam2.1_tiny", TINY)
    monkeypatch.setitem(VARIANTS, "sam2.1_small", replace(TINY, blocks=(1, 1, 3, 1)))
    spec = replace(save(folder, draw_weights()), name="sam2.1_small", architecture="sam2.1_small")

    with pytest.raises(WeightsError, match=r"holds the weights of sam2.1_tiny, expected the weights of sam2.1_small; "):
        sam2.load(spec, "cpu")


def test_another_familys_checkpoint_is_named_with_both(folder: Path) -> None:
    torch.save(nano.build_sam_nano().state_dict(), folder / "sam2.1_hiera_tiny.pt")

    with pytest.raises(WeightsError, match=r"tiny.pt: holds the weights of sam_nano, expected .* sam2.1_tiny; run `"):
        load_model(find_model("sam2.1_tiny"), "cpu")


def test_published_file_of_another_model_is_known_by_its_sha256(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = replace(save(folder, draw_weights()), name="sam2.1_small")
    monkeypatch.setitem(MODELS, "sam2.1_small", published)

    with pytest.raises(WeightsError, match=r"tiny.pt: the published file of sam2.1_small, expected .* sam2.1_tiny; "):
        sam2.load(replace(published, name="sam2.1_tiny", sha256="0" * 64), "cpu")


def test_finetuned_file_under_the_official_name_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "sam2.1_tiny", TINY)
    spec = replace(save(folder, draw_weights()), sha256="0" * 64)

    with pytest.raises(WeightsError, match=r"fits sam2.1_tiny, but is another or damaged file, with sha256"):
        sam2.load(spec, "cpu")


def test_pickled_payload_is_refused_and_never_run(folder: Path) -> None:
    spec = save(folder, {"weights": Payload(folder / "owned")})

    with pytest.raises(WeightsError, match=r"tiny.pt: holds pickled objects .* could run code; run `"):
        load_variant(spec, TINY, "cpu")

    assert not (folder / "owned").exists()


def test_missing_transformers_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(MissingLibraryError, match=r'sam2.1_tiny needs transformers.*"maskfleet\[models\]"'):
        load_model(find_model("sam2.1_tiny"), "cpu")


# Prompts


def test_logits_are_those_of_the_authors_own_code(folder: Path) -> None:
    """Recorded from SAM2ImagePredictor of facebookresearch/sam2 at 2b90b9f, with these weights and this picture."""
    model = load_tiny(folder, draw_weights())
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    [embedding] = model.embed([image])

    for prompt, multimask, iou, row in RECORDED:
        logits, predicted_iou = decode_prompt(model, embedding, prompt, (128, 128), multimask=multimask)
        assert predicted_iou[0].tolist() == pytest.approx(iou, abs=1e-4)
        assert logits[0, 0, 10, ::4].tolist() == pytest.approx(row, abs=1e-4)


def decode_prompt(
    model: SamModel, embedding: Any, prompt: Prompt, size_hw: tuple[int, int], *, multimask: bool
) -> tuple[Tensor, Tensor]:
    points = np.array([prompt.points]) if prompt.points else None
    return prompt_logits(
        model.sam,
        embedding,
        size_hw=size_hw,
        point_coords=None if points is None else points[..., :2],
        point_labels=None if points is None else points[..., 2].astype(int),
        boxes_xyxy=np.array([prompt.box_xyxy]) if prompt.box_xyxy else None,
        multimask=multimask,
    )


@pytest.mark.parametrize("steepness", [1, 300])
def test_prompts_on_a_phones_picture_are_answered_as_by_transformers(folder: Path, steepness: float) -> None:
    """With steep logits the first token's mask is stable and kept, with shallow ones the best of the others is."""
    model = load_tiny(folder, draw_weights(steepness=steepness))
    picture = phone_picture()
    image = decode(picture, name="phone.jpg")
    size_hw = (image.shape[0], image.shape[1])
    [embedding] = model.embed([image])

    found = model.prompted(image, embedding, PROMPTS, PromptParams())

    assert size_hw == (131, 96)
    for prompt, [mask] in zip(PROMPTS, found, strict=True):
        multimask = asks_one_point(prompt)
        reference, scores, masks = ask_transformers(model, picture, prompt, multimask)
        logits, _ = decode_prompt(model, embedding, prompt, size_hw, multimask=multimask)
        assert (logits[0] - reference).abs().max() < 1e-4 * max(1, reference.abs().max())
        assert mask.predicted_iou == pytest.approx(scores.max().item(), abs=1e-4)
        expected = masks[scores.argmax()].numpy()
        pixels = decode_counts(mask.counts, size_hw)
        assert expected.any()
        assert (pixels & expected).sum() >= 0.99 * (pixels | expected).sum()
        assert mask.area_px == pixels.sum()


def ask_transformers(model: SamModel, picture: bytes, prompt: Prompt, multimask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Low-resolution logits, predicted IoUs and full masks of one prompt, from file to mask by transformers alone."""
    side = model.sam.image_px
    processor = transformers.Sam2Processor(transformers.Sam2ImageProcessor(size={"height": side, "width": side}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGB")
    inputs = processor(
        images=upright,
        input_points=[[[[x, y] for x, y, _ in prompt.points]]] if prompt.points else None,
        input_labels=[[[inside for _, _, inside in prompt.points]]] if prompt.points else None,
        input_boxes=[[list(prompt.box_xyxy)]] if prompt.box_xyxy else None,
        return_tensors="pt",
    )
    with torch.no_grad():
        outputs = model.sam.model(
            **{name: value for name, value in inputs.items() if name != "original_sizes"}, multimask_output=multimask
        )
    [masks] = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])
    return outputs.pred_masks[0, 0], outputs.iou_scores[0, 0], masks[0]


def test_three_masks_are_kept_when_asked_for(folder: Path) -> None:
    model = load_tiny(folder, draw_weights())
    image = decode(phone_picture(), name="phone.jpg")
    [embedding] = model.embed([image])

    found = model.prompted(image, embedding, PROMPTS, PromptParams(multimask="all"))

    for prompt, masks in zip(PROMPTS, found, strict=True):
        _, scores, _ = ask_transformers(model, phone_picture(), prompt, multimask=True)
        assert [mask.predicted_iou for mask in masks] == pytest.approx(scores.tolist(), abs=1e-4)


def test_images_of_any_size_are_embedded_together_as_they_are_alone(folder: Path) -> None:
    model = load_tiny(folder, draw_weights())
    images = [
        decode(phone_picture(), name="a"),
        decode(phone_picture(300, 20), name="b"),
        np.zeros((1, 9, 3), np.uint8),
    ]

    together = model.embed(images)

    assert [tuple(level.shape) for level in together[0]] == [(1, 4, 32, 32), (1, 8, 16, 16), (1, 32, 8, 8)]
    for image, embedding in zip(images, together, strict=True):
        [alone] = model.embed([image])
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(alone, embedding, strict=True))


def test_thousands_of_prompts_are_decoded_a_bounded_number_at_a_time(folder: Path) -> None:
    model = load_tiny(folder, draw_weights())
    image = decode(phone_picture(), name="phone.jpg")
    [embedding] = model.embed([image])
    batches: list[int] = []
    model.sam.model.mask_decoder.register_forward_pre_hook(
        lambda module, args, given: batches.append(given["sparse_prompt_embeddings"].shape[1]), with_kwargs=True
    )
    prompts = [Prompt(box_xyxy=(1, 1, 20 + n % 30, 30)) for n in range(150)]

    found = model.prompted(image, embedding, prompts, PromptParams())

    assert [len(masks) for masks in found] == [1] * 150
    assert (max(batches), sum(batches)) == (4, 150)


# Automatic masks


@given(
    frame_hw=st.tuples(st.integers(1, 70), st.sampled_from([1, 2, 16, 31, 32, 33, 64, 96])),
    low=st.sampled_from([16, 32]),
    seed=st.integers(0, 1000),
)
@settings_of_hypothesis(deadline=None, max_examples=30)
def test_logits_go_straight_to_the_pixels_that_torch_interpolates(
    frame_hw: tuple[int, int], low: int, seed: int
) -> None:
    # Whole numbers meet the thresholds exactly, where every pixel is in doubt until torch's own roundings decide.
    random = np.random.default_rng(seed)
    logits = random.integers(-3, 4, (low, low)).astype(np.float32)
    logits[:, random.integers(low) :] = -5
    thresholds = (0.0, 1.0, -1.0)
    upsampling = Upsampling(low_hw=(low, low), mid=low, inside_hw=(low, low), frame_hw=frame_hw)
    batch = torch.from_numpy(logits).repeat(1, 3, 1, 1)
    expected = F.interpolate(batch, frame_hw, mode="bilinear", align_corners=False)[0, 0].numpy()

    patch = upsampling.patch(logits, min(thresholds))

    pixels, counts = np.zeros(frame_hw, np.bool_), [0, 0, 0]
    if patch is not None:
        cut = upsampling.cut(patch, thresholds)
        (x, y), (columns, rows) = cut.corner, cut.pixels.shape
        pixels[y : y + rows, x : x + columns] = cut.pixels.T
        counts = cut.counts.tolist()
    assert np.array_equal(pixels, expected > 0)
    assert counts == [int((expected > threshold).sum()) for threshold in thresholds]


class PlantedDecoder(nn.Module):
    """test_automatic's masks (local, with holes, islands and duplicates) behind the signature of SAM 2's decoder."""

    def __init__(self, low: int, seed: int) -> None:
        super().__init__()
        self.planted = test_automatic.PlantedDecoder(low, seed, tied=False)

    def forward(self, *, sparse_prompt_embeddings: Tensor, **rest: Any) -> tuple[Tensor, Tensor, None, None]:
        logits, iou = self.planted(None, None, sparse_prompt_embeddings[0], None, True)
        return logits[None], iou[None], None, None


@pytest.mark.parametrize("size_hw", [(131, 96), (40, 211), (20, 17), (300, 260)])
@pytest.mark.parametrize("crop_n_layers", [0, 1])
@pytest.mark.parametrize("planted", [True, False])
def test_automatic_masks_are_those_of_the_generator_written_plainly(
    folder: Path, size_hw: tuple[int, int], crop_n_layers: int, planted: bool
) -> None:
    model = load_tiny(folder, draw_weights(steepness=30))
    params = AutomaticParams(
        points_per_side=6,
        pred_iou_thresh=0.85 if planted else 0.6,
        stability_score_thresh=0.7,
        stability_score_offset=1.0 if planted else 0.3,
        # The masks of random weights reach everywhere: any suppression would leave a single one.
        box_nms_thresh=0.7 if planted else 1.0,
        crop_nms_thresh=0.7 if planted else 1.0,
        crop_n_layers=crop_n_layers,
        crop_n_points_downscale_factor=2,
    )
    if planted:
        model.sam.model.mask_decoder.forward = PlantedDecoder(32, seed=0).forward
    image = np.random.default_rng(3).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    [embedding] = model.embed([image])

    found = model.automatic(image, embedding, params)
    expected = generate_plainly(model.sam, image, params)

    assert len(found) >= 3
    assert [mask.prompt for mask in found] == [{"points": [[*point, 1]]} for _, _, point in expected]
    for mask, (pixels, predicted_iou, _) in zip(found, expected, strict=True):
        assert mask.predicted_iou == pytest.approx(predicted_iou, abs=1e-5)
        # The real decoder rounds otherwise with another number of prompts.
        assert (decode_counts(mask.counts, size_hw) != pixels).sum() <= (0 if planted else 3)


Plain = tuple[BoolMask, float, tuple[float, float]]


def generate_plainly(sam: Sam2, image: RgbImage, params: AutomaticParams) -> list[Plain]:
    """SAM2AutomaticMaskGenerator restated: every mask of every point at full size, then its thresholds and NMS."""
    height, width = image.shape[:2]
    crops, layers = generate_crop_boxes((height, width), params.crop_n_layers, params.crop_overlap_ratio)
    found: list[tuple[Plain, list[int]]] = []
    for crop, layer in zip(crops, layers, strict=True):
        side = int(params.points_per_side / params.crop_n_points_downscale_factor**layer)
        found += [(plain, crop) for plain in search_plainly(sam, image, crop, build_point_grid(side), params)]
    if len(crops) > 1:
        areas = torch.tensor([1 / ((x1 - x0) * (y1 - y0)) for _, (x0, y0, x1, y1) in found])
        keep = suppress([plain[0] for plain, _ in found], areas, params.crop_nms_thresh)
        found = [found[number] for number in keep]
    return [plain for plain, _ in found]


def search_plainly(
    sam: Sam2, image: RgbImage, crop: list[int], grid: np.ndarray[Any, Any], params: AutomaticParams
) -> list[Plain]:
    x0, y0, x1, y1 = crop
    size_hw = (y1 - y0, x1 - x0)
    with torch.no_grad():
        [embedding] = sam.embed([image[y0:y1, x0:x1]], fast=False)
        size_wh = np.array(size_hw[::-1])
        coords = torch.as_tensor(grid * size_wh * (sam.image_px / size_wh))[None, :, None]
        outputs = sam.model(input_points=coords, image_embeddings=embedding, multimask_output=True)
    logits = F.interpolate(outputs.pred_masks[0], size_hw, mode="bilinear", align_corners=False).flatten(0, 1)
    scores = outputs.iou_scores[0].flatten()
    offset = params.stability_score_offset
    stability = (logits > offset).sum((1, 2)) / (logits > -offset).sum((1, 2))
    passed = (scores > params.pred_iou_thresh) & (stability >= params.stability_score_thresh)
    passed &= (logits > 0).flatten(1).any(1)  # no mask is empty at these sizes
    numbers = passed.nonzero()[:, 0]
    masks = (logits > 0)[numbers]
    whole = [0, 0, image.shape[1], image.shape[0]]
    inner = ~is_box_near_crop_edge(masks_to_boxes(masks), crop, whole)
    numbers, masks = numbers[inner], masks[inner]
    plain: list[Plain] = []
    for kept in suppress(list(masks.numpy()), scores[numbers], params.box_nms_thresh):
        pixels = np.zeros(image.shape[:2], np.bool_)
        pixels[y0:y1, x0:x1] = masks[kept].numpy()
        x, y = grid[int(numbers[kept]) // 3] * size_hw[::-1]
        plain.append((pixels, float(scores[numbers[kept]]), (x + x0, y + y0)))
    return plain


def suppress(masks: list[BoolMask], scores: Tensor, threshold: float) -> list[int]:
    if not masks:
        return []
    boxes = masks_to_boxes(torch.from_numpy(np.stack(masks)))
    kept: list[int] = batched_nms(boxes, scores, torch.zeros(len(masks)), threshold).tolist()
    return kept


def test_fast_gives_much_the_same_masks(folder: Path) -> None:
    model = load_tiny(folder, draw_weights())
    image = decode(phone_picture(), name="phone.jpg")
    [embedding] = model.embed([image])
    params = AutomaticParams(points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0)

    def area(masks: list[Mask]) -> float:
        return float(np.mean([mask.area_px for mask in masks]))

    exact = model.automatic(image, embedding, params)
    fast = model.automatic(image, embedding, replace(params, precision="fast"))

    assert len(fast) == len(exact)
    assert area(fast) == pytest.approx(area(exact), rel=0.1)
