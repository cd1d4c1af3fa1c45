"""What a step of the decoder costs: SAM's focal and dice loss on masks, and the error of its predicted IoUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# SAM's own weights (Kirillov et al. 2023, section A): focal 20, dice 1, the predicted IoU 1. Here the predicted IoU
# counts more, because by it one of a click's three masks is chosen, and automatic masks are kept. It learns late: a
# tuning is minutes long (figures in tests/benchmarks/README.md).
FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 5.0
_FOCUS = 2.0
_OTHERS = 0.15  # of the two masks that are not the best: without any loss they would stop being masks


def focal_and_dice(logits: Tensor, covers: Tensor) -> Tensor:
    """The loss (n, M) of masks: logits (n, M, H, W) and the covered shares 0..1 of each object, (n, H, W)."""
    wanted = covers[:, None].expand_as(logits)
    chance = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    focal = ((chance - wanted).abs() ** _FOCUS * entropy).mean((-2, -1))
    overlap = (chance * wanted).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (chance.square().sum((-2, -1)) + wanted.square().sum((-2, -1)) + 1)
    return FOCAL_WEIGHT * focal + DICE_WEIGHT * dice


def best_of_three(losses: Tensor) -> Tensor:
    """Of the losses (n, 3) of an ambiguous prompt's masks, the best counts, and the others a little. One number."""
    return losses.amin(1).mean() + _OTHERS * losses.mean()


def iou_error(predicted: Tensor, true: Tensor, weights: Tensor | None = None) -> Tensor:
    """The squared error of predicted IoUs. All (n, M); weights: of each of them, 1 by default. One number."""
    error = (predicted - true).square()
    return IOU_WEIGHT * (error.mean() if weights is None else (error * weights).sum() / weights.sum().clamp(min=1))


def look_near(logits: Tensor, windows_xyxy: Tensor, *, input_px: int, side: int) -> Tensor:
    """The logits (n, M, H, W) of the padded input in a window of each, on a finer grid: (n, M, side, side).

    windows_xyxy: (n, 4), pixels of the encoder's input. Bilinear, as masks are upsampled to the image.
    """
    start, end = windows_xyxy[:, :2] / input_px * 2 - 1, windows_xyxy[:, 2:] / input_px * 2 - 1
    places = (torch.arange(side, device=logits.device) + 0.5) / side
    x = start[:, :1] + (end - start)[:, :1] * places
    y = start[:, 1:] + (end - start)[:, 1:] * places
    grid = torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], dim=-1)
    return F.grid_sample(logits, grid, mode="bilinear", padding_mode="border", align_corners=False)


def near_loss(logits: Tensor, covers: Tensor) -> Tensor:
    """Cross entropy and dice (n, M) near the objects: logits (n, M, S, S), the covered shares (n, S, S)."""
    wanted = covers[:, None].expand_as(logits)
    chance = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((-2, -1))
    overlap = (chance * wanted).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (chance.square().sum((-2, -1)) + wanted.square().sum((-2, -1)) + 1)
    return entropy + dice


@torch.no_grad()
def near_ious(logits: Tensor, near: Tensor, covers: Tensor, windows_xyxy: Tensor, *, input_px: int) -> Tensor:
    """IoU (n, M) of the thresholded masks with the objects: near them on the finer grid, elsewhere on the logits' own.

    logits: (n, M, H, W) and near: (n, M, S, S), of the same masks. covers: (n, S, S). windows_xyxy: (n, 4).
    """
    masks, wanted = near > 0, covers[:, None] > 0.5
    cell_px, side = input_px / logits.shape[-1], near.shape[-1]
    sides = (windows_xyxy[:, 2:] - windows_xyxy[:, :2]) / cell_px / side
    fine_area = sides.prod(1)[:, None]  # of a finer cell, in cells of the logits
    centres = (torch.arange(logits.shape[-1], device=logits.device) + 0.5) * cell_px
    across = (centres >= windows_xyxy[:, :1]) & (centres < windows_xyxy[:, 2:3])
    down = (centres >= windows_xyxy[:, 1:2]) & (centres < windows_xyxy[:, 3:])
    is_near = down[:, :, None] & across[:, None, :]
    far = ((logits > 0) & ~is_near[:, None]).sum((-2, -1)).float()
    both = (masks & wanted).sum((-2, -1)).float() * fine_area
    either = (masks | wanted).sum((-2, -1)).float() * fine_area + far
    return both / either.clamp(min=1e-6)
