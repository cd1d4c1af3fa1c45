"""The plan of sam_nano's training: the stages, and the weight of each part of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workers.models.nano import (
    EMBEDDING_SIZE,
    PATCH_SIZE_PX,
)

MASK_CELL_PX = PATCH_SIZE_PX // 4

# (part of the time at its end, side of the crop in cells of the embedding, images in a batch). Batches are small at
# first: there many steps matter more than exact gradients. Whole images come last, for objects larger than a crop.
STAGES = ((0.2, 16, 8), (0.4, 16, 12), (0.6, 24, 8), (1.0, EMBEDDING_SIZE, 6))
OBJECT_CLICKS = 5
BACKGROUND_CLICKS = 2
CORRECTIONS = 3  # in each image, this many objects get a corrected click; all objects get a box
BOX_WEIGHT, IOU_WEIGHT = 3.0, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings of a training run."""

    out: Path
    seconds: float
    seed: int
    device: str
    peak_rate: float
    start: Path | None = None
    head_batches: int = 250
