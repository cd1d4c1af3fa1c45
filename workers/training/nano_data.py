"""Batches of drawn scenes for sam_nano's training, with their prompts."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch

from workers.models.nano import (
    EMBEDDING_SIZE,
    IMAGE_SIZE_PX,
    PATCH_SIZE_PX,
    PIXEL_MEAN,
    PIXEL_STD,
)
from workers.training.nano_plan import MASK_CELL_PX, OBJECT_CLICKS, STAGES, Plan
from workers.training.scenes import Scene, draw_scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B images with K objects each, in the frame of the crop, which is S x S pixels.

    images: (B, 3, S, S) float32, normalised. targets: (B, K, S/2, S/2) float32, the share 0..1 of a mask cell that
    the object covers. boxes_xyxy: (B, K, 4) float32. background: (B, S/2, S/2) float32, like targets.
    offset_xy: the crop's offset in the embedding's grid.
    """

    images: torch.Tensor
    targets: torch.Tensor
    boxes_xyxy: torch.Tensor
    background: torch.Tensor
    offset_xy: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """P prompts on each of B images: points (B, P, N, 2) xy, labels (B, P, N), boxes (B, P, 4), logits (B, P, h, w)."""

    points: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    previous: torch.Tensor | None = None


def draw_batch(plan: Plan, step: int, done: float) -> Batch:
    """The batch of a step, from scenes that no other step uses. done: the part 0..1 of the time that is over."""
    rng = np.random.default_rng((plan.seed, step))
    cells, count = next((cells, count) for end, cells, count in STAGES if done < end)
    samples = [draw_sample(rng, cells * PATCH_SIZE_PX) for _ in range(count)]
    images, targets, boxes, background = (torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))
    # The offset is a multiple of the attention window, so a crop has the same windows as the whole image.
    room = (EMBEDDING_SIZE - cells) // 8 + 1
    return Batch(
        images=images.to(plan.device),
        targets=targets.to(plan.device),
        boxes_xyxy=boxes.to(plan.device),
        background=background.to(plan.device),
        offset_xy=(8 * int(rng.integers(room)), 8 * int(rng.integers(room))),
    )


def draw_sample(rng: np.random.Generator, side_px: int) -> tuple[npt.NDArray[np.float32], ...]:
    """One scene as (image, targets, boxes, background) of a Batch, padded like Sam.preprocess."""
    scene = _draw_padded_scene(rng, side_px)
    image = np.zeros((3, side_px, side_px), np.float32)
    h, w = scene.owner.shape
    normalised = (scene.image - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)
    image[:, :h, :w] = normalised.transpose(2, 0, 1)
    owner = np.pad(scene.owner, ((0, side_px - h), (0, side_px - w)))
    chosen = np.resize(rng.permutation(scene.object_count)[:OBJECT_CLICKS], OBJECT_CLICKS) + 1
    masks = [(owner == index).astype(np.uint8) for index in chosen]
    x_y_w_h = np.array([cv2.boundingRect(mask) for mask in masks], np.float32)
    boxes = np.concatenate([x_y_w_h[:, :2], x_y_w_h[:, :2] + x_y_w_h[:, 2:]], axis=1)
    return image, np.stack([_cover(mask) for mask in masks]), boxes, _cover((owner == 0).astype(np.uint8))


def _draw_padded_scene(rng: np.random.Generator, side_px: int) -> Scene:
    """A scene with objects. It is as large as the frame, or shorter on one side."""
    is_whole = side_px == IMAGE_SIZE_PX
    while True:
        size = [side_px, side_px]
        if rng.random() < (0.6 if is_whole else 0.25):
            size[rng.integers(2)] = int(side_px * rng.uniform(0.5, 1.0))
        unit = IMAGE_SIZE_PX * rng.uniform(0.85 if is_whole else 0.6, 1.15)
        scene = draw_scene(int(rng.integers(1 << 40)), (size[0], size[1]), unit_px=unit)
        if scene.object_count:
            return scene


def _cover(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The share of each mask cell that a mask (S, S) of 0 and 1 covers, (S/2, S/2) float32."""
    cells = (mask.shape[1] // MASK_CELL_PX, mask.shape[0] // MASK_CELL_PX)
    return np.asarray(cv2.resize(mask.astype(np.float32), cells, interpolation=cv2.INTER_AREA), np.float32)
