"""Changes the mask decoder step by step. The encoders stay as they are.

No asset of the held-out fifth is read here. So the verdict is about images that nothing was chosen by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from workers.tuning.batch import Batch, Objects, draw_batch, draw_corrections
from workers.tuning.decoding import Asked, decode
from workers.tuning.lessons import NEAR_SIDE, Lesson
from workers.tuning.loss import best_of_three, focal_and_dice, iou_error, look_near, near_ious, near_loss

PEAK_RATE, WEIGHT_DECAY, WARM_UP_STEPS = 1e-3, 0.01, 50
AVERAGED = 0.01  # the newest weights' share of the average, from about step 1,000 on
# How far the kept weights are on the way from the first ones to the average. Between them a decoder does as well on
# images like those that teach, and loses less on others (Wortsman et al. 2022, "Robust fine-tuning of zero-shot
# models"; figures in tests/benchmarks/README.md).
KEPT = 0.75
_SINGLE_OF_CLICK, _WRONG_WEIGHT = 0.3, 0.5

EmbeddingOf = Callable[[Lesson], Tensor]  # (1, C, h, w) float32 on the device


@dataclass(slots=True, kw_only=True)
class Run:
    """A training as it stands. start, average: the decoder's parameters by name, at first and on average."""

    sam: Sam
    start: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    seed: int
    step: int = 0
    seconds: float = 0.0

    def kept(self) -> dict[str, Tensor]:
        """The decoder's weights that the tuning gives."""
        return {name: torch.lerp(first, self.average[name], KEPT) for name, first in self.start.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A step's loss, and the mean IoUs of its boxes, of its clicks (the best of three) and of its corrected clicks."""

    loss: float
    box: float
    click: float
    corrected: float


def begin(sam: Sam, seed: int) -> Run:
    """A run from the decoder that `sam` has. Its decoder may change from here on, all else may not."""
    sam.requires_grad_(False)
    sam.mask_decoder.requires_grad_(True).train()
    parameters = dict(sam.mask_decoder.named_parameters())
    return Run(
        sam=sam,
        start={name: value.detach().clone() for name, value in parameters.items()},
        average={name: value.detach().clone() for name, value in parameters.items()},
        optimizer=torch.optim.AdamW(list(parameters.values()), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY),
        seed=seed,
    )


def train(
    run: Run,
    lessons: Sequence[Lesson],
    embedding_of: EmbeddingOf,
    *,
    seconds: float,
    clock: Callable[[], float],
) -> Iterator[Report]:
    """Take steps until the run has had `seconds` of `clock`, and yield the report of each.

    lessons: with at least one target each. The run may be stored between two steps, and goes on from there.
    """
    began = clock() - run.seconds
    while run.seconds < seconds:
        rng = np.random.default_rng((run.seed, run.step))
        batch = draw_batch(rng, lessons, str(run.sam.device))
        embeddings = torch.cat([embedding_of(lesson) for lesson in batch.lessons])
        report = _take_step(run, rng, batch, embeddings, _rate(run, seconds))
        run.seconds = clock() - began
        yield report


def _rate(run: Run, seconds: float) -> float:
    """A warm-up, then a cosine over the run's time down to a hundredth of the peak."""
    warmth = min(1.0, (run.step + 1) / WARM_UP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * min(run.seconds / seconds, 1.0)))
    return PEAK_RATE * warmth * (0.01 + 0.99 * cosine)


def _take_step(run: Run, rng: np.random.Generator, batch: Batch, embeddings: Tensor, rate: float) -> Report:
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    loss, report = compute_loss(run.sam, rng, batch, embeddings)
    torch.autograd.backward(loss)
    parameters = dict(run.sam.mask_decoder.named_parameters())
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    run.optimizer.step()
    run.step += 1
    share = max(AVERAGED, 9 / (run.step + 9))  # early weights are soon forgotten
    with torch.no_grad():
        for name, value in parameters.items():
            run.average[name].lerp_(value, share)
    return report


def compute_loss(sam: Sam, rng: np.random.Generator, batch: Batch, embeddings: Tensor) -> tuple[Tensor, Report]:
    """The loss of boxes, of clicks, of prompts with a deleted mask, and of corrections to the clicks' masks."""
    count, input_px = len(batch.images), sam.image_encoder.img_size
    logits, ious = decode(sam, embeddings, batch.asked)
    boxed, true_box = _judge(logits[:count, :1], batch.objects, input_px)
    clicked, true_click = _judge(logits[count : 2 * count], batch.objects, input_px)
    loss = boxed.mean() + best_of_three(clicked[:, 1:]) + _SINGLE_OF_CLICK * clicked[:, 0].mean()
    loss = loss + iou_error(ious[:count, :1], true_box) + iou_error(ious[count : 2 * count], true_click)
    if batch.wrong_images:
        loss = loss + _WRONG_WEIGHT * iou_error(ious[2 * count :], _best_ious(logits[2 * count :].detach(), batch))
    # correct the mask that a person would see
    best = ious[count : 2 * count, 1:].detach().argmax(1)
    shown = logits[count : 2 * count, 1:].detach()[torch.arange(count), best]
    rows, asked = draw_corrections(rng, batch, shown)
    corrected, true_corrected, error = _correct(sam, embeddings, asked, batch.objects.of(rows))
    loss = loss + corrected + error
    return loss, Report(
        loss=float(loss.detach()),
        box=float(true_box.mean()),
        click=float(true_click[:, 1:].amax(1).mean()),
        corrected=true_corrected,
    )


def _correct(sam: Sam, embeddings: Tensor, asked: Asked, objects: Objects) -> tuple[Tensor, float, Tensor]:
    logits, ious = decode(sam, embeddings, asked)
    losses, true = _judge(logits[:, :1], objects, sam.image_encoder.img_size)
    return losses.mean(), float(true.mean()), iou_error(ious[:, :1], true)


def _judge(logits: Tensor, objects: Objects, input_px: int) -> tuple[Tensor, Tensor]:
    """The loss (n, M) of masks (n, M, H, W) of these objects, and their true IoUs (n, M)."""
    near = look_near(logits, objects.near_xyxy, input_px=input_px, side=NEAR_SIDE)
    losses = focal_and_dice(logits, objects.covers) + near_loss(near, objects.near)
    return losses, near_ious(logits, near, objects.near, objects.near_xyxy, input_px=input_px)


@torch.no_grad()
def _best_ious(logits: Tensor, batch: Batch) -> Tensor:
    """The IoU (m, 4) of the masks of wrong prompts with the object of their image that they fit best.

    The person deleted one mask there. Another output may well be an object that was kept.
    """
    best = torch.zeros(logits.shape[:2], device=logits.device)
    for place, lesson in enumerate(batch.lessons):
        rows = [row for row, image in enumerate(batch.wrong_images) if image == place]
        if not rows:
            continue
        covers = np.stack([target.cover(lesson.frame.grid_hw) for target in lesson.targets]) > 0.5
        wanted = torch.from_numpy(covers).to(logits.device).flatten(1).float()
        masks = (logits[rows] > 0).flatten(2).float()
        both = masks @ wanted.T
        either = masks.sum(2, keepdim=True) + wanted.sum(1) - both
        best[rows] = (both / either.clamp(min=1)).amax(2)
    return best
