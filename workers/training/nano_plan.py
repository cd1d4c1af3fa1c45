"""How sam_nano is trained: the stages, and how much each part of the loss weighs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workers.models.nano import (
    EMBEDDING_SIZE,
    PATCH_SIZE_PX,
)

MASK_CELL_PX = PATCH_SIZE_PX // 4

# (part of the time after which it ends, side of the crop in cells of the embedding, images a batch). Small batches at
# first, where many steps matter more than quiet ones; whole images last, for objects larger than a crop.
STAGES = ((0.2, 16, 8), (0.4, 16, 12), (0.6, 24, 8), (1.0, EMBEDDING_SIZE, 6))
OBJECT_CLICKS = 5
BACKGROUND_CLICKS = 2
CORRECTIONS = 3  # objects an image whose click is corrected; all get a box
BOX_WEIGHT, IOU_WEIGHT = 3.0, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run was asked."""

    out: Path
    seconds: float
    seed: int
    device: str
    peak_rate: float
    start: Path | None = None
    head_batches: int = 250
