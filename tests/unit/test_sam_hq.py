"""SAM-HQ through its official files' layout, against its authors' numbers and transformers' own pipeline."""

from __future__ import annotations

import hashlib
import io
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from torch import Tensor

from tests.pixels import decode_counts
from tests.unit.test_models import Payload, make_spec
from tests.unit.test_sam2 import phone_picture
from workers.engine.decoder import prompt_logits
from workers.images.decode import decode
from workers.models.registry import find_model
from workers.models.sam import ARCHITECTURES, SamModel, load, load_sam
from workers.models.sam_hq import build_sam_hq
from workers.models.spec import ModelSpec, WeightsError
from workers.params import AutomaticParams, PromptParams
from workers.prompts import Prompt, asks_one_point

build_tiny = partial(
    build_sam_hq, width=16, depth=3, heads=2, global_blocks=(1, 2), image_px=128, channels=32, window=3
)
PROMPTS = [
    Prompt(box_xyxy=(10, 10, 60, 70)),
    Prompt(points=((20.5, 30, 1),)),
    Prompt(points=((20, 30, 1), (50, 50, 0))),
    Prompt(box_xyxy=(3.5, 4, 90, 88), points=((20, 30, 1), (50, 50, 0))),
    Prompt(box_xyxy=(0, 0, 30, 41)),
]

# Prompt, whether for several masks, predicted IoU, every fourth logit of row 10.
RECORDED = [
    (PROMPTS[0], False, [-4.5643], [-0.74034, -0.56205, -0.2106, -0.37045, -0.58523, -0.37998, -0.4316, -0.59347]),
    (PROMPTS[1], True, [5.1945], [-0.95613, -0.58231, -0.25509, -0.35507, -0.70767, -0.71755, -0.46832, -0.59851]),
    (PROMPTS[2], False, [-5.50943], [-0.57383, -0.45251, -0.11024, -0.26617, -0.43348, -0.2409, -0.29311, -0.473]),
    (PROMPTS[3], False, [-5.77282], [-0.70467, -0.50262, -0.11791, -0.25255, -0.53167, -0.34337, -0.35993, -0.56879]),
]


pytestmark = [pytest.mark.usefixtures("one_thread", "folder"), pytest.mark.slow]  # slow: models are built


def draw_weights() -> dict[str, Tensor]:
    """Weights by the authors' names, the same on every machine; of this seed, masks cover about half of a picture."""
    random = np.random.default_rng(11)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build_tiny().state_dict().items()}
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = random.standard_normal(shape, np.float32)
        if "positional_encoding" not in name:
            values = 1 + values * 0.2 if "norm" in name and name.endswith("weight") else values * 0.2
        weights[name] = torch.from_numpy(np.asarray(values, np.float32))
    return weights


def save(folder: Path, content: object) -> ModelSpec:
    torch.save(content, folder / "sam_hq_vit_b.pth")
    return make_spec(folder / "sam_hq_vit_b.pth", name="sam_hq_vit_b", family="sam-hq")


def load_tiny(folder: Path) -> Sam:
    return load_sam(save(folder, draw_weights()), build_tiny, "cpu")


# The official files, without the files


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("sam_hq_vit_b", "a936f5af4fdc9d748282e3e0ac81c512fd08a6746c741f75d0829670ae360829"),
        ("sam_hq_vit_l", "2df33ee0db8ffcd6bbd8f14fcd4b06e5f3ac880280d045d23e4a1d89cdf2e4ae"),
        ("sam_hq_vit_h", "1b9dcc3384f03538467075d7f77a650209fee46b79299b5e9e6fff4be92062de"),
    ],
)
def test_names_and_shapes_are_those_of_the_authors_modules(name: str, digest: str) -> None:
    """digest: of the names and shapes that SysCV/sam-hq builds."""
    with torch.device("meta"):
        sam = ARCHITECTURES[name]()
    shapes = {key: tuple(tensor.shape) for key, tensor in sam.state_dict().items()}

    assert hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest() == digest
    assert shapes["mask_decoder.hf_token.weight"] == (1, 256)
    assert shapes["mask_decoder.compress_vit_feat.0.weight"][1:] == (256, 2, 2)
    assert find_model(name).parameter_count == sum(parameter.numel() for parameter in sam.parameters())
    # A torch archive adds a header, padding, a directory entry and a pickled record to each tensor.
    overhead = find_model(name).size_bytes - 4 * sum(tensor.numel() for tensor in sam.state_dict().values())
    assert overhead / len(shapes) == pytest.approx(317, abs=2)


# The loader


def test_official_layout_gives_a_frozen_float32_model_with_its_weights(folder: Path) -> None:
    sam, weights = load_tiny(folder), draw_weights()

    assert sam.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in sam.state_dict().items())
    assert not sam.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in sam.parameters())


def test_plain_sams_checkpoint_is_named_with_the_model_that_was_wanted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two differ by a few of hundreds of tensors, and their files by one word in the name."""
    plain = {name: tensor for name, tensor in draw_weights().items() if "mask_decoder.hf" not in name}
    monkeypatch.setitem(ARCHITECTURES, "sam_hq_vit_b", build_tiny)
    spec = save(folder, plain)

    with pytest.raises(
        WeightsError, match=r"vit_b.pth: holds .* missing \(mask_decoder.hf_token.* sam_hq_vit_b; run `"
    ):
        load(spec, "cpu")


def test_other_variants_checkpoint_is_named_with_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "sam_hq_vit_l", build_tiny)

    with pytest.raises(WeightsError, match=r"holds the weights of sam_hq_vit_l, expected .* sam_hq_vit_b; run `"):
        load(save(folder, draw_weights()), "cpu")


def test_pickled_payload_is_refused_and_never_run(folder: Path) -> None:
    spec = save(folder, {"weights": Payload(folder / "owned")})

    with pytest.raises(WeightsError, match=r"vit_b.pth: holds pickled objects .* could run code; run `"):
        load_sam(spec, build_tiny, "cpu")

    assert not (folder / "owned").exists()


# Prompts


def decode_prompt(
    sam: Sam, embedding: Tensor, prompt: Prompt, size_hw: tuple[int, int], *, multimask: bool
) -> tuple[Tensor, Tensor]:
    points = np.array([prompt.points]) if prompt.points else None
    return prompt_logits(
        sam,
        embedding,
        size_hw=size_hw,
        point_coords=None if points is None else points[..., :2],
        point_labels=None if points is None else points[..., 2].astype(int),
        boxes_xyxy=np.array([prompt.box_xyxy]) if prompt.box_xyxy else None,
        multimask=multimask,
    )


def test_logits_are_those_of_the_authors_own_code(folder: Path) -> None:
    """Recorded from SamPredictor of SysCV/sam-hq, with these weights and this picture."""
    sam = load_tiny(folder)
    image = np.random.default_rng(0).integers(0, 256, (128, 96, 3), dtype=np.uint8)
    [embedding] = SamModel(sam).embed([image])

    for prompt, multimask, iou, row in RECORDED:
        logits, predicted_iou = decode_prompt(sam, embedding, prompt, (128, 96), multimask=multimask)
        assert predicted_iou[0].tolist() == pytest.approx(iou, abs=1e-4)
        assert logits[0, 0, 10, ::4].tolist() == pytest.approx(row, abs=1e-4)


def test_prompts_on_a_phones_picture_are_answered_as_by_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = build_reference(transformers, draw_weights())
    processor = transformers.SamHQProcessor(
        transformers.SamImageProcessor(size={"longest_edge": 128}, pad_size={"height": 128, "width": 128})
    )
    model = SamModel(load_tiny(folder))
    # As long as the encoder's input: the two resize with different roundings, 1 of 256 grey levels apart.
    picture = phone_picture(96, 128)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGB")
    image = decode(picture, name="phone.jpg")
    [embedding] = model.embed([image])

    found = model.prompted(image, embedding, PROMPTS, PromptParams())

    assert image.shape == (128, 96, 3)
    for prompt, [mask] in zip(PROMPTS, found, strict=True):
        inputs = processor(
            images=upright,
            input_points=[[[[x, y] for x, y, _ in prompt.points]]] if prompt.points else None,
            input_labels=[[[inside for _, _, inside in prompt.points]]] if prompt.points else None,
            input_boxes=[[list(prompt.box_xyxy)]] if prompt.box_xyxy else None,
            return_tensors="pt",
        )
        sizes = [inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes")]
        multimask = asks_one_point(prompt)
        with torch.no_grad():
            outputs = reference(**inputs, multimask_output=multimask)
        logits, _ = decode_prompt(model.sam, embedding, prompt, (128, 96), multimask=multimask)
        assert (logits[0, 0] - outputs.pred_masks[0, 0, 0]).abs().max() < 1e-4
        assert mask.predicted_iou == pytest.approx(outputs.iou_scores[0, 0, 0].item(), rel=1e-4)
        [masks] = processor.post_process_masks(outputs.pred_masks, *sizes)
        expected, pixels = masks[0, 0].numpy(), decode_counts(mask.counts, (128, 96))
        assert expected.any()
        assert (pixels & expected).sum() >= 0.99 * (pixels | expected).sum()


def build_reference(transformers, weights):
    """transformers' SamHQModel of these sizes, its names made of the authors'."""
    vision = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "global_attn_indexes": [1, 2]}
    config = transformers.SamHQConfig(
        vision_config={**vision, "image_size": 128, "output_channels": 32, "window_size": 3, "num_pos_feats": 16},
        prompt_encoder_config={"hidden_size": 32, "image_size": 128},
        mask_decoder_config={"hidden_size": 32, "vit_dim": 16},
    )
    model = transformers.SamHQModel(config).eval()
    renamings = [
        (r"^image_encoder\.blocks", "vision_encoder.layers"),
        (r"^image_encoder", "vision_encoder"),
        (r"neck\.([0-3])", lambda m: "neck." + ("conv1", "layer_norm1", "conv2", "layer_norm2")[int(m[1])]),
        (r"patch_embed\.proj\.", "patch_embed.projection."),
        (r"\.norm", ".layer_norm"),
        (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
        (r"point_embeddings", "point_embed"),
        (r"mask_downscaling\.0", "mask_embed.conv1"),
        (r"mask_downscaling\.1", "mask_embed.layer_norm1"),
        (r"mask_downscaling\.3", "mask_embed.conv2"),
        (r"mask_downscaling\.4", "mask_embed.layer_norm2"),
        (r"mask_downscaling\.6", "mask_embed.conv3"),
        (r"output_upscaling\.0", "upscale_conv1"),
        (r"output_upscaling\.1", "upscale_layer_norm"),
        (r"output_upscaling\.3", "upscale_conv2"),
        (r"(_mlps\.\d|_head|hf_mlp)\.layers\.1\.", r"\1.LAYERS.0."),
        (r"(_mlps\.\d|_head|hf_mlp)\.layers\.0\.", r"\1.proj_in."),
        (r"(_mlps\.\d|_head|hf_mlp)\.layers\.2\.", r"\1.proj_out."),
        (r"LAYERS", "layers"),
        (r"hf_token", "hq_token"),
        (r"hf_mlp", "hq_mask_mlp"),
        (r"compress_vit_feat\.([013])", lambda m: "compress_vit_" + {"0": "conv1", "1": "norm", "3": "conv2"}[m[1]]),
        (r"embedding_encoder\.([013])", lambda m: "encoder_" + {"0": "conv1", "1": "norm", "3": "conv2"}[m[1]]),
        (r"embedding_maskfeature\.([013])", lambda m: "mask_" + {"0": "conv1", "1": "norm", "3": "conv2"}[m[1]]),
    ]
    renamed = {}
    for name, tensor in weights.items():
        for theirs, own in renamings:
            name = re.sub(theirs, own, name)
        renamed[name] = tensor
    shared = "shared_image_embedding.positional_embedding"
    renamed[shared] = renamed["prompt_encoder.shared_embedding.positional_embedding"]
    model.load_state_dict(renamed, strict=True)
    model.mask_decoder.transformer.register_forward_hook(hand_on_the_image, with_kwargs=True)
    return model


def hand_on_the_image(module, args, given, made):
    """Put the image as the transformer leaves it where the decoder goes on with the image as it was.

    transformers 5.23 drops the former, and swaps rows and columns of the latter; its authors' decoder does neither.
    """
    image = given["image_embeddings"]
    image.copy_(made[1].squeeze(1).transpose(1, 2).view_as(image).transpose(2, 3))


def test_many_prompts_are_decoded_a_bounded_number_at_a_time(folder: Path) -> None:
    model = SamModel(load_tiny(folder))
    image = decode(phone_picture(), name="phone.jpg")
    [embedding] = model.embed([image])
    batches: list[int] = []
    model.sam.mask_decoder.transformer.register_forward_hook(lambda module, given, made: batches.append(len(given[0])))

    found = model.prompted(
        image, embedding, [Prompt(box_xyxy=(1, 1, 20 + n % 30, 30)) for n in range(70)], PromptParams()
    )

    assert [len(masks) for masks in found] == [1] * 70
    assert (max(batches), sum(batches)) == (4, 70)


# Automatic masks


@pytest.mark.parametrize("size_hw", [(131, 96), (40, 211)])
@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_automatic_masks_are_those_of_the_reference_generator(
    folder: Path, size_hw: tuple[int, int], crop_n_layers: int
) -> None:
    """segment_anything's generator runs over SAM-HQ too, since its decoder takes what MaskDecoder takes."""
    sam = load_tiny(folder)
    image = np.random.default_rng(3).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    settings_ = {
        "points_per_side": 4,
        "pred_iou_thresh": -9.0,
        "stability_score_thresh": 0.3,
        "stability_score_offset": 0.1,
        "box_nms_thresh": 1.0,
    }
    params = AutomaticParams(**settings_, crop_n_layers=crop_n_layers, crop_nms_thresh=1.0)
    generator = SamAutomaticMaskGenerator(
        sam, **settings_, crop_n_layers=crop_n_layers, crop_nms_thresh=1.0, output_mode="coco_rle"
    )
    [embedding] = SamModel(sam).embed([image])

    found = SamModel(sam).automatic(image, embedding, params)
    expected = generator.generate(image)

    assert len(found) >= 3
    assert [mask.prompt["points"][0][:2] for mask in found if mask.prompt] == [m["point_coords"][0] for m in expected]
    for mask, reference in zip(found, expected, strict=True):
        assert mask.predicted_iou == pytest.approx(reference["predicted_iou"], abs=1e-5)
        assert mask.area_px == pytest.approx(reference["area"], abs=3)
