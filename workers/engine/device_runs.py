"""Many masks drawn where their logits are, whole frames in groups of one shape; only their runs leave the device.

On a CPU it pays to draw masks one at a time inside the box that their logits bound (`upsampling`). That needs an answer
for every mask, which a GPU would have to be waited for; here it is asked twice for any number of masks.
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

# What the buffers of one group of masks may take.
GROUP_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Of n masks. boxes: (n, 4) int64, inclusive x0, y0, x1, y1 of the frame, zeros for a mask of no pixel.
    stability: (n,) float32, NaN where no pixel reaches even the lower threshold."""

    boxes: Tensor
    stability: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDrawing:
    """How logits (n, h, w) on any device become masks of one frame; pixels above the threshold are the mask's."""

    upsampling: Upsampling
    threshold: float

    def score(self, logits: Tensor, stability_offset: float) -> Scores:
        """Score at least one mask at full resolution. Waits for nothing."""
        boxes, stability = [], []
        for _, frames in self._groups(logits):
            inner = (frames > self.threshold + stability_offset).sum((1, 2))
            outer = (frames > self.threshold - stability_offset).sum((1, 2))
            stability.append(inner / outer)
            boxes.append(batched_mask_to_box(frames > self.threshold))
        return Scores(boxes=torch.cat(boxes)[: len(logits)], stability=torch.cat(stability)[: len(logits)])

    def changes(self, logits: Tensor) -> Tensor:
        """Where the masks' runs start and end by turns, (r,) int64: counted down the columns of one mask after the
        other, each column one background pixel longer than the frame is high. Waits once a group."""
        height, width = self.upsampling.frame_hw
        found = [torch.zeros(0, dtype=torch.int64, device=logits.device)]
        for first, frames in self._groups(logits):
            present = frames[: len(logits) - first] > self.threshold
            columns = present.new_zeros(1 + len(present) * width * (height + 1))
            columns[1:].view(-1, width, height + 1)[..., :height] = present.transpose(1, 2)
            found.append((columns[1:] ^ columns[:-1]).nonzero()[:, 0] + first * width * (height + 1))
        return torch.cat(found)

    def _groups(self, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(number of the first, pixels (m, H, W)) of equally many masks at a time, the last repeated to fill up."""
        height, width = self.upsampling.frame_hw
        # beside the float32 buffers, some boolean ones and the padded columns
        most = max(2, GROUP_BYTES // (self.upsampling.frame_bytes() + 4 * height * width))
        count = -(-len(logits) // most)
        size = max(2, -(-len(logits) // count)) if count else 0
        for first in range(0, len(logits), max(size, 1)):
            group = logits[first : first + size]
            if len(group) < size:
                group = torch.cat([group, group[-1:].expand(size - len(group), -1, -1)])
            yield first, self.upsampling.frames(group)


def to_host(*parts: Tensor) -> list[NDArray[np.float64]]:
    """Bring tensors of one device here in one copy, each flat and in float64, which float32 and places fit into."""
    everything = torch.cat([part.flatten().double() for part in parts]).cpu().numpy()
    return np.split(everything, np.cumsum([part.numel() for part in parts])[:-1])


def read_runs(changes: NDArray[np.int64], count: int, frame_hw: tuple[int, int]) -> list[BoxedRuns]:
    """The runs of `count` masks from what `DeviceDrawing.changes` gave."""
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
