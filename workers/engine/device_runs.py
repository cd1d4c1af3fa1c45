"""Many masks at once on the device of their logits: whole frames, in groups of one shape. Only runs leave the device.

On a CPU it is faster to upsample one mask at a time, only inside a box found from its logits (`upsampling`). On a GPU
that would mean one wait for each mask. Here there are two waits for any number of masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.utils.amg import batched_mask_to_box
from torch import Tensor

from workers.engine.boxed_runs import BoxedRuns
from workers.engine.upsampling import Upsampling

# The most bytes for the buffers of one group of masks.
GROUP_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The scores of n masks.

    boxes: (n, 4) int64, inclusive x0, y0, x1, y1 in the frame; zeros for a mask without pixels.
    stability: (n,) float32; NaN where no pixel reaches the lower threshold.
    """

    boxes: Tensor
    stability: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMasks:
    """Upsamples and thresholds logits (n, h, w) on any device. A mask is the frame's pixels above the threshold."""

    upsampling: Upsampling
    threshold: float

    def score(self, logits: Tensor, stability_offset: float) -> Scores:
        """Score one or more masks at full resolution, without waiting for the device."""
        boxes, stability = [], []
        for _, frames in self._groups(logits):
            inner = (frames > self.threshold + stability_offset).sum((1, 2))
            outer = (frames > self.threshold - stability_offset).sum((1, 2))
            stability.append(inner / outer)
            boxes.append(batched_mask_to_box(frames > self.threshold))
        return Scores(boxes=torch.cat(boxes)[: len(logits)], stability=torch.cat(stability)[: len(logits)])

    def changes(self, logits: Tensor) -> Tensor:
        """Sorted positions where the masks' runs start and stop, in turn: (r,) int64.

        A position counts the pixels column by column, one mask after the other. Each column has one extra background
        pixel at its end. Waits for the device once for each group.
        """
        height, width = self.upsampling.frame_hw
        found = [torch.zeros(0, dtype=torch.int64, device=logits.device)]
        for first, frames in self._groups(logits):
            present = frames[: len(logits) - first] > self.threshold
            columns = present.new_zeros(1 + len(present) * width * (height + 1))
            columns[1:].view(-1, width, height + 1)[..., :height] = present.transpose(1, 2)
            found.append((columns[1:] ^ columns[:-1]).nonzero()[:, 0] + first * width * (height + 1))
        return torch.cat(found)

    def _groups(self, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Groups of equal size: (number of the first mask, pixels (m, H, W)). Repeats fill up the last group."""
        height, width = self.upsampling.frame_hw
        # 4 bytes a pixel beside the float32 buffers: some boolean buffers and the padded columns
        most = max(2, GROUP_BYTES // (self.upsampling.frame_bytes() + 4 * height * width))
        count = -(-len(logits) // most)
        size = max(2, -(-len(logits) // count)) if count else 0
        for first in range(0, len(logits), max(size, 1)):
            group = logits[first : first + size]
            if len(group) < size:
                group = torch.cat([group, group[-1:].expand(size - len(group), -1, -1)])
            yield first, self.upsampling.frames(group)


def to_host(*parts: Tensor) -> list[NDArray[np.float64]]:
    """Copy tensors of one device to the CPU in one copy, each flat and in float64. That holds float32 and positions
    exactly."""
    everything = torch.cat([part.flatten().double() for part in parts]).cpu().numpy()
    return np.split(everything, np.cumsum([part.numel() for part in parts])[:-1])


def read_runs(changes: NDArray[np.int64], count: int, frame_hw: tuple[int, int]) -> list[BoxedRuns]:
    """The runs of `count` masks from the result of `DeviceMasks.changes`."""
    height, width = frame_hw
    number, place = np.divmod(changes, width * (height + 1))
    ends = np.searchsorted(number, np.arange(1, count))
    return [_boxed(of_one, height) for of_one in np.split(place, ends)] if count else []


def _boxed(changes: NDArray[np.int64], height: int) -> BoxedRuns:
    if len(changes) == 0:
        return BoxedRuns(box=(0, 0, 0, 0), changes=changes, area_px=0)
    column, row = np.divmod(changes, height + 1)
    x0, x1 = int(column[0]), int(column[-1])
    y0, y1 = int(row[::2].min()), int(row[1::2].max()) - 1
    in_box = (column - x0) * (y1 - y0 + 2) + row - y0
    return BoxedRuns(box=(x0, y0, x1, y1), changes=in_box, area_px=int(changes[1::2].sum() - changes[::2].sum()))
