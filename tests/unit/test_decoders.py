"""Decoders without their encoders, decoders that are kept between prompts, and masks as prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from torch import nn

from tests.pixels import decode_counts
from tests.unit import test_sam2, test_sam_hq
from tests.unit.test_automatic import make_image, make_sam
from workers.embeddings.address import EmbeddingFormat, EmbeddingOf
from workers.embeddings.codec import decode, encode
from workers.engine.decoder import prompt_logits
from workers.engine.mask_prompt import mask_input
from workers.engine.promptable import Promptable
from workers.engine.prompted import prompt_decoder, prompted_masks
from workers.engine.sam import promptable
from workers.masks import BoolMask, Mask, encode_counts
from workers.masks import decode_counts as pixels_of
from workers.models.decoders import DECODERS, NoEncoder, load_decoder, load_sam_decoder
from workers.models.registry import MODELS, find_model
from workers.models.sam import ARCHITECTURES, SamModel, load, load_sam
from workers.models.sam2 import VARIANTS, Sam2, load_decoder_variant
from workers.models.sam_hq import build_around
from workers.models.spec import ModelError, WeightsError
from workers.params import PromptParams
from workers.prompts import Prompt

BEST = PromptParams()
PROMPTS = [
    Prompt(box_xyxy=(10, 10, 60, 70)),
    Prompt(points=((20.5, 30, 1),)),
    Prompt(points=((20, 30, 1), (50, 50, 0))),
    Prompt(box_xyxy=(3.5, 4, 90, 88), points=((20, 30, 1), (50, 50, 0))),
]
SIZE_HW = (90, 131)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]  # slow: models are built


def names_and_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def iou(one: BoolMask, other: BoolMask) -> float:
    return 1.0 if not (one | other).any() else float((one & other).sum() / (one | other).sum())


# Without an encoder


@pytest.mark.parametrize("name", DECODERS)
def test_a_sams_decoder_has_every_weight_but_the_encoders(name: str) -> None:
    with torch.device("meta"):
        whole, decoder = names_and_shapes(ARCHITECTURES[name]()), names_and_shapes(DECODERS[name]())
    assert decoder == {n: shape for n, shape in whole.items() if not n.startswith("image_encoder.")}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sam_2s_decoder_has_every_weight_but_the_encoders(name: str) -> None:
    pytest.importorskip("transformers")
    with torch.device("meta"):
        whole = names_and_shapes(Sam2(VARIANTS[name]))
        decoder = names_and_shapes(Sam2(VARIANTS[name], has_encoder=False))
    kept = {n: shape for n, shape in whole.items() if not n.startswith("image_encoder.")}
    assert decoder == {n: shape for n, shape in kept.items() if n != "no_mem_embed"}


def test_every_model_that_takes_points_has_a_decoder() -> None:
    clickable = {name for name, spec in MODELS.items() if "points" in spec.prompts}
    assert clickable == {*DECODERS, *VARIANTS}
    with pytest.raises(ModelError, match="sam3 takes text and exemplar, no points"):
        load_decoder(find_model("sam3"), "cpu")


def test_a_decoders_embed_says_that_there_is_no_encoder() -> None:
    decoder = load_decoder(find_model("sam_nano"), "cpu")
    with pytest.raises(ModelError, match="without its image encoder"):
        decoder.embed([make_image(32, 32)], fast=False)


def test_wrong_files_are_refused_as_for_the_whole_model(folder: Path) -> None:
    spec = test_sam_hq.save(folder, test_sam_hq.draw_weights())
    build = partial(build_around, NoEncoder(128), width=16, image_px=128, channels=32)
    path = folder / spec.weights_file
    for content, said in (
        ({"a": torch.zeros(1)}, "holds another model's weights"),
        (test_sam_hq.draw_weights() | {"mask_decoder.more": torch.zeros(1)}, "1 unexpected .mask_decoder.more"),
    ):
        with pytest.raises(WeightsError, match=said):
            load_sam_decoder(test_sam_hq.save(folder, content), build, "cpu")
    changed = replace(test_sam_hq.save(folder, test_sam_hq.draw_weights()), sha256="00" * 32)
    with pytest.raises(WeightsError, match="fits sam_hq_vit_b, but is another or damaged file"):
        load_sam_decoder(changed, build, "cpu")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="truncated"):
        load_sam_decoder(spec, build, "cpu")


# Every family: from an image through a kept embedding to masks


def nano(folder: Path) -> tuple[Any, Promptable]:
    spec = find_model("sam_nano")
    return load(spec, "cpu"), load_decoder(spec, "cpu")


def hq(folder: Path) -> tuple[Any, Promptable]:
    spec = test_sam_hq.save(folder, test_sam_hq.draw_weights())
    build = partial(build_around, NoEncoder(128), width=16, image_px=128, channels=32)
    whole = SamModel(load_sam(spec, test_sam_hq.build_tiny, "cpu"))
    return whole, load_sam_decoder(spec, build, "cpu")


def sam2(folder: Path) -> tuple[Any, Promptable]:
    pytest.importorskip("transformers")
    weights = test_sam2.draw_weights()
    decoder = load_decoder_variant(test_sam2.save(folder, weights), test_sam2.TINY, "cpu")
    return test_sam2.load_tiny(folder, weights), decoder


@pytest.mark.parametrize("family", [nano, hq, sam2])
@pytest.mark.parametrize(("embedding_format", "least"), [(EmbeddingFormat.FP16, 0.99), (EmbeddingFormat.INT8, 0.85)])
def test_masks_from_a_kept_embedding_are_nearly_those_from_the_image(
    folder: Path, family: Callable[[Path], tuple[Any, Promptable]], embedding_format: EmbeddingFormat, least: float
) -> None:
    """Random weights: their logits lie about the threshold everywhere, which is the worst case for int8."""
    whole, decoder = family(folder)
    image = make_image(*SIZE_HW)
    [embedding] = whole.embed([image])
    of = EmbeddingOf(
        model="x", weights_sha256="ab" * 32, fast=False, format=embedding_format, source="s", key="k", etag="e"
    )

    kept = decode(encode(embedding, of), of.stamp)

    for prompt in PROMPTS:
        [[expected]] = whole.prompted(image, embedding, [prompt], BEST)
        [[exact]] = prompted_masks(decoder, embedding, [prompt], BEST, size_hw=SIZE_HW)
        [[found]] = prompted_masks(decoder, kept, [prompt], BEST, size_hw=SIZE_HW)
        assert exact == expected
        assert iou(decode_counts(found.counts, SIZE_HW), decode_counts(expected.counts, SIZE_HW)) >= least


@pytest.mark.parametrize("family", [nano, hq, sam2])
def test_a_kept_decoder_answers_every_prompt_as_a_new_one_and_needs_no_embedding(
    folder: Path, family: Callable[[Path], tuple[Any, Promptable]]
) -> None:
    whole, decoder = family(folder)
    [embedding] = whole.embed([make_image(*SIZE_HW)])
    kept = prompt_decoder(decoder, embedding)

    for _ in range(2):
        for prompt in PROMPTS:
            again = prompted_masks(decoder, None, [prompt], BEST, size_hw=SIZE_HW, decode=kept)
            assert again == prompted_masks(decoder, embedding, [prompt], BEST, size_hw=SIZE_HW)


# Masks as prompts


def disc(size_hw: tuple[int, int], centre_xy: tuple[float, float], radius: float) -> BoolMask:
    y, x = np.mgrid[: size_hw[0], : size_hw[1]]
    inside: BoolMask = (x - centre_xy[0]) ** 2 + (y - centre_xy[1]) ** 2 <= radius**2
    return inside


@pytest.mark.parametrize("size_hw", [(90, 131), (131, 90), (600, 20), (1, 1)])
def test_a_masks_logits_lie_where_the_mask_lies_in_the_encoders_frame(size_hw: tuple[int, int]) -> None:
    model = promptable(make_sam(planted=False), fold_from_dim=0)
    mask = disc(size_hw, (size_hw[1] / 2, size_hw[0] / 3), min(size_hw) / 3)

    logits = mask_input(model, mask)

    assert logits.shape == (1, 1, *model.low_hw)
    assert logits.min() == -10
    assert logits.max() <= 10
    low = logits[0, 0].numpy() > 0
    scale = max(model.low_hw) / max(size_hw)
    assert low.sum() == pytest.approx(mask.sum() * scale**2, rel=0.15, abs=4)


@pytest.mark.parametrize("size_hw", [(90, 131), (131, 90)])
def test_a_mask_prompt_is_answered_as_by_the_predictor(size_hw: tuple[int, int]) -> None:
    sam = make_sam(planted=False)
    image, mask = make_image(*size_hw), disc(size_hw, (50, 45), 20)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    model = promptable(sam, fold_from_dim=0)
    low = mask_input(model, mask)

    for prompt in PROMPTS:
        points = np.array([prompt.points]) if prompt.points else None
        one_point = len(prompt.points) == 1 and prompt.box_xyxy is None
        logits, predicted_iou = prompt_logits(
            model,
            None,
            size_hw=size_hw,
            point_coords=None if points is None else points[..., :2],
            point_labels=None if points is None else points[..., 2].astype(int),
            boxes_xyxy=np.array([prompt.box_xyxy]) if prompt.box_xyxy else None,
            multimask=one_point,
            decode=prompt_decoder(model, predictor.features, mask),
        )
        _, scores, expected = predictor.predict(
            None if points is None else points[0, :, :2],
            None if points is None else points[0, :, 2],
            box=np.array(prompt.box_xyxy) if prompt.box_xyxy else None,
            mask_input=low[0].numpy(),
            multimask_output=one_point,
        )
        without, _ = prompt_logits(
            model,
            predictor.features,
            size_hw=size_hw,
            point_coords=None if points is None else points[..., :2],
            point_labels=None if points is None else points[..., 2].astype(int),
            boxes_xyxy=np.array([prompt.box_xyxy]) if prompt.box_xyxy else None,
            multimask=one_point,
        )
        assert np.abs(logits[0].numpy() - expected).max() < 1e-4
        assert np.abs(predicted_iou[0].numpy() - scores).max() < 1e-4
        assert (logits - without).abs().max() > 1e-3


@pytest.mark.parametrize("family", [nano, hq, sam2])
def test_every_family_takes_a_mask_prompt(folder: Path, family: Callable[[Path], tuple[Any, Promptable]]) -> None:
    whole, decoder = family(folder)
    [embedding] = whole.embed([make_image(*SIZE_HW)])
    mask = disc(SIZE_HW, (60, 40), 25)

    def answers(mask: BoolMask | None) -> list[list[Mask]]:
        kept = prompt_decoder(decoder, embedding, mask)
        return prompted_masks(decoder, None, PROMPTS, BEST, size_hw=SIZE_HW, decode=kept)

    assert answers(mask) == answers(mask)
    assert answers(mask) != answers(None)


# A stored mask's run lengths


def test_only_the_run_lengths_of_a_mask_of_this_size_are_read() -> None:
    mask = disc((40, 30), (15, 20), 9)
    counts = encode_counts(mask)

    assert (pixels_of(counts, (40, 30)) == mask).all()
    for wrong, size_hw in ((counts, (41, 30)), (counts, (40, 29)), ("", (4, 4)), ("0", (4, 4)), ("é", (4, 4))):
        with pytest.raises(ValueError, match=r"of \d+ x|to \d+ x"):
            pixels_of(wrong, size_hw)
