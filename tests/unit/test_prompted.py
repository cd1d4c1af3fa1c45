"""Prompts through our path against segment_anything's own SamPredictor."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import Sam

from tests.pixels import decode_counts
from tests.unit.test_automatic import make_image, make_sam
from workers.engine.decoder import prompt_logits
from workers.engine.prompted import prompted_masks
from workers.engine.sam import input_hw
from workers.models.sam import SamModel
from workers.params import PromptParams
from workers.prompts import Prompt, asks_one_point

BEST, ALL = PromptParams(), PromptParams(multimask="all")
PROMPTS = [
    Prompt(box_xyxy=(10, 10, 60, 70)),
    Prompt(points=((20.5, 30, 1),)),
    Prompt(points=((20, 30, 1), (50, 50, 0))),
    Prompt(box_xyxy=(3.5, 4, 90, 88), points=((20, 30, 1), (50, 50, 0))),
    Prompt(box_xyxy=(0, 0, 30, 41)),
]


def ask(predictor: SamPredictor, prompt: Prompt, multimask: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    points = np.array([[x, y] for x, y, _ in prompt.points]) if prompt.points else None
    labels = np.array([inside for _, _, inside in prompt.points]) if prompt.points else None
    box = np.array(prompt.box_xyxy) if prompt.box_xyxy else None
    return predictor.predict(points, labels, box=box, multimask_output=multimask)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vit_b() -> Sam:
    torch.manual_seed(0)
    return sam_model_registry["vit_b"]().eval().requires_grad_(False)


@pytest.mark.parametrize("size_hw", [(480, 640), (201, 97)])
def test_low_resolution_logits_of_vit_b_are_the_predictors(vit_b: Sam, size_hw: tuple[int, int]) -> None:
    predictor = SamPredictor(vit_b)
    predictor.features = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(1))
    predictor.original_size, predictor.input_size, predictor.is_image_set = size_hw, input_hw(vit_b, size_hw), True
    for prompt in PROMPTS:
        one_point = asks_one_point(prompt)
        points = np.array([prompt.points]) if prompt.points else None
        logits, predicted_iou = prompt_logits(
            vit_b,
            predictor.features,
            size_hw=size_hw,
            point_coords=None if points is None else points[..., :2],
            point_labels=None if points is None else points[..., 2].astype(int),
            boxes_xyxy=np.array([prompt.box_xyxy]) if prompt.box_xyxy else None,
            multimask=one_point,
            fold_from_dim=0,
        )
        masks, scores, reference = ask(predictor, prompt, one_point)
        assert np.abs(logits[0].numpy() - reference).max() < 1e-4
        assert np.abs(predicted_iou[0].numpy() - scores).max() < 1e-4
        [[found]] = prompted_masks(vit_b, predictor.features, [prompt], BEST, size_hw=size_hw)
        expected = masks[scores.argmax()]
        pixels = decode_counts(found.counts, size_hw)
        assert (pixels & expected).sum() >= 0.99 * (pixels | expected).sum()
        assert found.area_px == pixels.sum()


@pytest.mark.parametrize("size_hw", [(90, 131), (131, 90)])
def test_prompts_of_all_makes_together_are_answered_as_each_alone_by_the_predictor(size_hw: tuple[int, int]) -> None:
    sam = make_sam(planted=False)
    image = make_image(*size_hw)
    model, predictor = SamModel(sam), SamPredictor(sam)
    predictor.set_image(image)
    [embedding] = model.embed([image])

    found = model.prompted(image, embedding, PROMPTS, BEST)
    all_three = model.prompted(image, embedding, PROMPTS, ALL)

    for prompt, [mask], three in zip(PROMPTS, found, all_three, strict=True):
        masks, scores, _ = ask(predictor, prompt, asks_one_point(prompt))
        differing = decode_counts(mask.counts, size_hw) != masks[scores.argmax()]
        assert differing.sum() <= 2
        assert mask.predicted_iou == pytest.approx(scores.max(), abs=1e-5)
        _, scores, _ = ask(predictor, prompt, True)
        assert [m.predicted_iou for m in three] == pytest.approx(scores.tolist(), abs=1e-5)


def test_thousands_of_prompts_are_decoded_a_bounded_number_at_a_time() -> None:
    sam = make_sam(planted=False)
    [embedding] = SamModel(sam).embed([make_image(64, 64)])
    batches: list[int] = []
    sam.prompt_encoder.register_forward_hook(lambda module, given, made: batches.append(len(made[0])))
    prompts = [Prompt(box_xyxy=(1, 1, 20 + n % 30, 30)) for n in range(150)]
    prompts += [Prompt(points=tuple((5.0, 5.0, 1) for _ in range(400))) for _ in range(3)]

    found = prompted_masks(sam, embedding, prompts, BEST, size_hw=(64, 64))

    assert [len(masks) for masks in found] == [1] * 153
    assert max(batches) == 64
    assert batches[-3:] == [1, 1, 1]
    assert all(a.size_hw == b.size_hw for [a], [b] in pairwise(found))
