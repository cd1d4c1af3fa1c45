"""A step's prompts, drawn from a few lessons. The same seed and step draw the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.tuning.decoding import Asked
from workers.tuning.lessons import Lesson, Target, WrongPrompt
from workers.tuning.prompts import Xy, draw_box, draw_click, draw_correction

IMAGES, OBJECTS_AN_IMAGE, WRONG_AN_IMAGE, CORRECTIONS_AN_IMAGE = 3, 4, 1, 2
_REFINED = 0.4  # of the steps with corrections: the mask is given too, as a click in the editor gives it

_INSIDE, _FIRST_CORNER, _LAST_CORNER, _PADDING = 1.0, 2.0, 3.0, -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """n objects of a batch on the device. covers: (n, H, W) and near: (n, S, S), shares 0..1. near_xyxy: (n, 4)."""

    covers: Tensor
    near: Tensor
    near_xyxy: Tensor

    def of(self, rows: Sequence[int]) -> Objects:
        chosen = torch.tensor(rows, device=self.covers.device)
        return Objects(covers=self.covers[chosen], near=self.near[chosen], near_xyxy=self.near_xyxy[chosen])


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step: n objects, each with a box and a click, and m prompts whose masks were deleted.

    asked: n boxes, n clicks, m wrong prompts, in this order. wrong_images: (m) the image of each wrong prompt.
    """

    lessons: Sequence[Lesson]
    images: Sequence[int]
    clicks: Sequence[Xy]
    objects: Objects
    asked: Asked
    wrong_images: Sequence[int]


def draw_batch(rng: np.random.Generator, lessons: Sequence[Lesson], device: str) -> Batch:
    """Draw IMAGES lessons with targets, and some objects and wrong prompts of each."""
    chosen = [lessons[k] for k in rng.choice(len(lessons), size=min(IMAGES, len(lessons)), replace=False)]
    images: list[int] = []
    targets: list[Target] = []
    wrong_images: list[int] = []
    wrong: list[WrongPrompt] = []
    for place, lesson in enumerate(chosen):
        some = _some(rng, len(lesson.targets), OBJECTS_AN_IMAGE)
        images += [place] * len(some)
        targets += [lesson.targets[k] for k in some]
        some = _some(rng, len(lesson.wrong), WRONG_AN_IMAGE)
        wrong_images += [place] * len(some)
        wrong += [lesson.wrong[k] for k in some]
    frame = chosen[0].frame
    clicks = [draw_click(rng, target, frame.cell_px) for target in targets]
    boxes = [draw_box(rng, target.box_xyxy) for target in targets]
    rows = [_box(box) for box in boxes] + [_click(click) for click in clicks] + [_wrong(one) for one in wrong]
    asked = Asked(
        images=torch.tensor([*images, *images, *wrong_images], device=device),
        points=torch.tensor([points for points, _ in rows], dtype=torch.float32, device=device),
        labels=torch.tensor([labels for _, labels in rows], device=device),
    )
    return Batch(
        lessons=chosen,
        images=images,
        clicks=clicks,
        objects=_stack(targets, frame.grid_hw, device),
        asked=asked,
        wrong_images=wrong_images,
    )


def draw_corrections(rng: np.random.Generator, batch: Batch, shown: Tensor) -> tuple[list[int], Asked]:
    """A second click on an error of some of the masks (n, H, W) that the clicks gave, as logits.

    Returns the numbers of their objects, and the prompts: the first click and the second.
    """
    device = shown.device
    rows = _some(rng, len(batch.images), CORRECTIONS_AN_IMAGE * len(batch.lessons))
    grid = batch.lessons[0].frame
    covers = batch.objects.covers
    drawn = [draw_correction(rng, shown[row].cpu().numpy(), covers[row].cpu().numpy(), grid.cell_px) for row in rows]
    points = [[batch.clicks[row], xy, (0.0, 0.0)] for row, (xy, _) in zip(rows, drawn, strict=True)]
    labels = [[_INSIDE, float(label), _PADDING] for _, label in drawn]
    asked = Asked(
        images=torch.tensor([batch.images[row] for row in rows], device=device),
        points=torch.tensor(points, dtype=torch.float32, device=device),
        labels=torch.tensor(labels, device=device),
        previous=shown[torch.tensor(rows, device=device)][:, None] if rng.random() < _REFINED else None,
    )
    return rows, asked


def _some(rng: np.random.Generator, count: int, most: int) -> list[int]:
    return [int(k) for k in rng.choice(count, size=min(most, count), replace=False)] if count else []


def _box(box: tuple[float, float, float, float]) -> tuple[list[Xy], list[float]]:
    return [(box[0], box[1]), (box[2], box[3])], [_FIRST_CORNER, _LAST_CORNER]


def _click(xy: Xy) -> tuple[list[Xy], list[float]]:
    return [xy, (0.0, 0.0)], [_INSIDE, _PADDING]


def _wrong(wrong: WrongPrompt) -> tuple[list[Xy], list[float]]:
    if wrong.box_xyxy is not None:
        return _box(wrong.box_xyxy)
    assert wrong.point_xy is not None
    return _click(wrong.point_xy)


def _stack(targets: Sequence[Target], grid_hw: tuple[int, int], device: str) -> Objects:
    near = np.stack([target.near for target in targets]).astype(np.float32) / 255
    return Objects(
        covers=torch.from_numpy(np.stack([target.cover(grid_hw) for target in targets])).to(device),
        near=torch.from_numpy(near).to(device),
        near_xyxy=torch.tensor([target.near_xyxy for target in targets], dtype=torch.float32, device=device),
    )
