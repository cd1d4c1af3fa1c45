"""How well a model does on the held-out assets: by boxes, clicks and corrected clicks, and without prompts.

It asks through the same engine as jobs and clicks do, and compares in the image's own pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from workers.engine.automatic import automatic_masks
from workers.engine.promptable import Promptable
from workers.engine.prompted import prompt_decoder, prompted_masks
from workers.masks import BoolMask, Mask, decode_counts
from workers.params import AutomaticParams, PromptParams
from workers.prompts import Prompt
from workers.tuning.outcome import Searched
from workers.tuning.prompts import middle_of

FOUND_IOU = 0.75  # an automatic mask with this IoU finds the object
PROMPTED_OBJECTS = 100  # of an asset; a slide of cells has thousands


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A model's answers for one asset. All lists are of its objects, in order.

    box, click, corrected: the IoU 0..1 of each answer. shown: the mask of each box and of each click.
    """

    box: Sequence[float]
    click: Sequence[float]
    corrected: Sequence[float]
    shown: dict[str, Sequence[Mask]]


def judge(model: Promptable, embedding: Tensor, masks: Sequence[BoolMask]) -> Judged:
    """Ask for each of these masks (H, W) of an image: by its box, by a click in its middle, and by a second click.

    The second click is in the middle of the first answer's largest error. embedding: of the image.
    """
    size_hw = (masks[0].shape[0], masks[0].shape[1])
    truth = [_rle(mask) for mask in masks]
    decode = prompt_decoder(model, embedding)

    def ask(prompts: Sequence[Prompt]) -> list[Mask]:
        made = prompted_masks(model, None, prompts, PromptParams(), size_hw=size_hw, decode=decode)
        return [answers[0] for answers in made]

    boxed = ask([Prompt(box_xyxy=_box(mask)) for mask in masks])
    middles = [middle_of(mask) for mask in masks]
    clicked = ask([Prompt(points=((x, y, 1),)) for x, y in middles])
    corrected = ask([_correct(*one) for one in zip(masks, middles, clicked, strict=True)])
    return Judged(
        box=_ious(boxed, truth),
        click=_ious(clicked, truth),
        corrected=_ious(corrected, truth),
        shown={"box": boxed, "click": clicked},
    )


def search(
    model: Promptable, embedding: Tensor, masks: Sequence[BoolMask], params: AutomaticParams
) -> tuple[list[Mask], NDArray[np.float64]]:
    """The n automatic masks of an image, and their IoUs (n, objects) with these masks (H, W) of it.

    The image itself is not needed, for no crops of it are looked at.
    """
    blank = np.zeros((*masks[0].shape, 3), np.uint8)
    made = automatic_masks(model, blank, replace(params, crop_n_layers=0), embedding=embedding)
    if not made:
        return [], np.zeros((0, len(masks)))
    ious = coco_mask.iou([_stored(mask) for mask in made], [_rle(mask) for mask in masks], [0] * len(masks))
    return made, np.asarray(ious, np.float64)


def searched(model: Promptable, embedding: Tensor, masks: Sequence[BoolMask], params: AutomaticParams) -> Searched:
    """Which of these masks (H, W) of an image automatic masks find, and how many there are."""
    made, ious = search(model, embedding, masks, params)
    return Searched(found=[bool(best >= FOUND_IOU) for best in ious.max(axis=0, initial=0)], masks=len(made))


def _correct(mask: BoolMask, middle: tuple[float, float], shown: Mask) -> Prompt:
    """The click, and a second one in the middle of what is missing or too much, whichever is larger."""
    answer = decode_counts(shown.counts, shown.size_hw)
    missing, extra = mask & ~answer, answer & ~mask
    is_missing = int(missing.sum() >= extra.sum())
    wrong = missing if is_missing else extra
    if not wrong.any():
        return Prompt(points=((*middle, 1),))
    return Prompt(points=((*middle, 1), (*middle_of(wrong), is_missing)))


def _ious(answers: Sequence[Mask], truth: Sequence[dict[str, object]]) -> list[float]:
    return [
        float(coco_mask.iou([_stored(answer)], [wanted], [0])[0, 0])
        for answer, wanted in zip(answers, truth, strict=True)
    ]


def _box(mask: BoolMask) -> tuple[float, float, float, float]:
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    return float(x), float(y), float(x + width), float(y + height)


def _rle(mask: NDArray[np.bool_]) -> dict[str, object]:
    encoded: dict[str, object] = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
    return encoded


def _stored(mask: Mask) -> dict[str, object]:
    return {"size": list(mask.size_hw), "counts": mask.counts.encode("ascii")}
