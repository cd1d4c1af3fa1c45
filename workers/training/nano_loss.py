"""sam_nano's loss, and the clicks that correct its errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam

from workers.training.nano_data import Batch, Prompts
from workers.training.nano_forward import decode, encode
from workers.training.nano_plan import BACKGROUND_CLICKS, BOX_WEIGHT, CORRECTIONS, IOU_WEIGHT, MASK_CELL_PX


def compute_loss(model: Sam, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of clicks, of boxes, and of corrections to the clicks' masks."""
    embeddings = encode(model, batch)
    clicks, points, logits, ious, report = click_loss(model, batch, embeddings)
    # A third of the boxes are inexact. In a sixth of the batches the boxes come with a click.
    points_of_boxes = sample_points(batch.targets)[:, :, None] if torch.rand(()) < 1 / 6 else None
    labels_of_boxes = None if points_of_boxes is None else torch.ones_like(points_of_boxes[..., 0])
    prompts = Prompts(points=points_of_boxes, labels=labels_of_boxes, boxes=jitter(batch.boxes_xyxy))
    boxed, report["box"] = single_mask_loss(model, batch, embeddings, prompts)
    # Corrections are for the mask that the model itself would choose.
    shown = ious[..., 1:].argmax(-1)[:, :CORRECTIONS, None, None, None].expand(-1, -1, 1, *logits.shape[-2:])
    targets = batch.targets[:, :CORRECTIONS]
    first = logits[:, :CORRECTIONS, 1:].gather(2, shown)[:, :, 0].detach().float()
    more, labels = sample_corrections(first, targets, count=int(torch.randint(1, 4, ())))
    prompts = Prompts(
        points=torch.cat([points[:, :CORRECTIONS, None], more], dim=2),
        labels=torch.cat([torch.ones_like(labels[..., :1]), labels], dim=2),
        previous=first if torch.rand(()) < 0.4 else None,
    )
    corrected, report["corrected"] = single_mask_loss(model, batch, embeddings, prompts)
    return clicks + BOX_WEIGHT * boxed + corrected, report


def click_loss(
    model: Sam, batch: Batch, embeddings: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, float]]:
    """One click on each object, and some on the background. There no mask is right, and only the IoU is trained.

    Returns the loss, the points (B, P, 2), logits (B, P, 4, h, w), predicted IoU (B, P, 4), and the report.
    """
    k = batch.targets.shape[1]
    ground = batch.background[:, None].expand(-1, BACKGROUND_CLICKS, -1, -1)
    points = sample_points(torch.cat([batch.targets, ground], dim=1))
    prompts = Prompts(points=points[:, :, None], labels=torch.ones_like(points[..., :1]))
    logits, ious = decode(model, batch, embeddings, prompts)
    true = true_ious(logits, torch.cat([batch.targets, torch.zeros_like(ground)], dim=1))
    # The best of the three masks learns most. The others learn a little, so that all stay usable.
    losses = mask_losses(logits[:, :k], batch.targets)
    three = losses[..., 1:]
    shapes = three.amin(-1).mean() + 0.15 * three.mean() + 0.5 * losses[..., 0].mean()
    loss = shapes + IOU_WEIGHT * F.mse_loss(ious, true)
    guess = ious.detach()
    shown = guess[:, :k, 1:].argmax(-1, keepdim=True)
    report = {
        "click": float(true[:, :k, 1:].amax(-1).mean()),
        "shown": float(true[:, :k, 1:].gather(2, shown).mean()),
        "iou_error": float((guess - true).abs().mean()),
        "ground": float(guess[:, k:, 1:].amax(-1).mean()),
    }
    return loss, points, logits, guess, report


def single_mask_loss(
    model: Sam, batch: Batch, embeddings: torch.Tensor, prompts: Prompts
) -> tuple[torch.Tensor, float]:
    """The loss and the mean IoU of clear prompts. They use the first mask token."""
    logits, ious = decode(model, batch, embeddings, prompts)
    targets = batch.targets[:, : logits.shape[1]]
    true = true_ious(logits[:, :, :1], targets)
    loss = mask_losses(logits[:, :, :1], targets).mean() + IOU_WEIGHT * F.mse_loss(ious[..., :1], true)
    return loss, float(true.mean())


def mask_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy plus dice loss (B, P, M) of logits (B, P, M, h, w); targets (B, P, h, w) are covered shares."""
    logits = logits.float()
    targets = targets[:, :, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((-2, -1))
    chance = logits.sigmoid()
    overlap = (chance * targets).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (chance.square().sum((-2, -1)) + targets.square().sum((-2, -1)) + 1)
    return 2 * entropy + dice


@torch.no_grad()
def true_ious(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of the thresholded masks on the mask grid, (B, P, M) float32. 0 for an empty target."""
    masks, wanted = logits > 0, targets[:, :, None] > 0.5
    both = (masks & wanted).sum((-2, -1)).float()
    return both / (masks | wanted).sum((-2, -1)).clamp(min=1).float()


@torch.no_grad()
def sample_points(weights: torch.Tensor) -> torch.Tensor:
    """A random point of each map (B, P, h, w): (B, P, 2) xy pixels. In its cells above 0.5, if it has any."""
    chance = torch.rand_like(weights) * (weights + 10 * (weights > 0.5))
    flat = chance.flatten(2).argmax(-1)
    cell = torch.stack([flat % weights.shape[-1], flat // weights.shape[-1]], dim=-1).float()
    return (cell + torch.rand_like(cell)) * MASK_CELL_PX - 0.5


@torch.no_grad()
def sample_corrections(logits: torch.Tensor, targets: torch.Tensor, *, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clicks on the errors of logits (B, P, h, w): points (B, P, count, 2) xy and labels (B, P, count), 1 inside."""
    inside = targets > 0.5
    # When nothing is wrong, the object gets another click.
    wrong = ((logits > 0) != inside).float() + 1e-3 * inside
    points = torch.stack([sample_points(wrong) for _ in range(count)], dim=2)
    x, y = ((points + 0.5) / MASK_CELL_PX).long().clamp(0, targets.shape[-1] - 1).unbind(-1)
    return points, inside.flatten(2).gather(2, y * targets.shape[-1] + x).float()


@torch.no_grad()
def jitter(boxes_xyxy: torch.Tensor) -> torch.Tensor:
    """The boxes (B, P, 4). In a third of them the corners are shifted by about 5 % of the sides."""
    sides = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).repeat(1, 1, 2)
    is_loose = torch.rand_like(boxes_xyxy[..., :1]) < 1 / 3
    return boxes_xyxy + is_loose * 0.05 * sides * torch.randn_like(boxes_xyxy)
