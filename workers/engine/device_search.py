"""The search for masks in one crop that stays on the device. A GPU uses it.

It finds the same masks in the same order as `automatic`'s own search, in the reference's way: every candidate is scored
at full resolution, in groups of one shape. The device decodes all points. The CPU waits only where it needs a number:
how many passed by predicted IoU, by stability and by suppression, and how many runs there are. One copy brings the
masks to the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.utils.amg import is_box_near_crop_edge
from torch import Tensor
from torchvision.ops.boxes import batched_nms

from workers.engine.boxed_runs import FoundMask, InclusiveBox
from workers.engine.decoder import decode_evenly
from workers.engine.device_runs import DeviceMasks, read_runs, to_host
from workers.engine.promptable import Decode, ModelOutputError, Promptable, half_precision, scale_xy
from workers.params import AutomaticParams

# The logits of this many points are in memory at once: with three outputs 805 MB in float32. A finer grid takes several
# rounds.
POINTS_HELD = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """Outputs that passed by predicted IoU and stability, on the device.

    point: (n,), numbers of the points in the grid. predicted_iou, stability: (n,) float32. boxes: (n, 4) in the crop.
    logits: (n, h, w).
    """

    point: Tensor
    predicted_iou: Tensor
    stability: Tensor
    boxes: Tensor
    logits: Tensor

    def only(self, numbers: Tensor) -> Passed:
        """Only the outputs with these numbers, in this order."""
        return Passed(
            point=self.point[numbers],
            predicted_iou=self.predicted_iou[numbers],
            stability=self.stability[numbers],
            boxes=self.boxes[numbers],
            logits=self.logits[numbers],
        )


class DeviceSearch:
    """The search in one crop for a model on a GPU. It works on any device."""

    def __init__(
        self, model: Promptable, params: AutomaticParams, *, crop: InclusiveBox, size_hw: tuple[int, int]
    ) -> None:
        self.model, self.params, self.crop, self.size_hw = model, params, crop, size_hw
        self.crop_hw = (crop[3] - crop[1], crop[2] - crop[0])
        self.upsampling = model.upsampling(self.crop_hw)
        self.device_masks = DeviceMasks(upsampling=self.upsampling, threshold=model.mask_threshold)
        # for the predicted IoUs, and for the logits of the outputs that pass by them
        self._finite = torch.ones(2, dtype=torch.bool, device=model.device)

    def masks(self, embedding: Any, grid: NDArray[np.float64]) -> list[FoundMask]:
        """Masks from the points of grid (n, 2), in fractions of the crop, after suppression inside the crop."""
        points = grid * np.array(self.crop_hw[::-1])
        rounds = list(self._rounds(embedding, points))
        if rounds:
            passed = rounds[0] if len(rounds) == 1 else _joined(rounds)
            return self._to_masks(passed.only(self._suppress(passed)), points)
        self._require_finite(self._finite.tolist())
        return []

    def _rounds(self, embedding: Any, points: NDArray[np.float64]) -> Iterator[Passed]:
        # float64 up to the positional encoding, as in the reference's generator
        coords = torch.as_tensor(points * scale_xy(self.model, self.crop_hw), device=self.model.device)[:, None]
        labels = torch.ones(coords.shape[:2], dtype=torch.int, device=self.model.device)
        # all points together, because SAM's prompt encoder waits for the device several times in each call
        sparse = self.model.encode_prompts((coords, labels), None)
        with half_precision(self.model.device, is_wanted=self.params.precision == "fast"):
            decode = self.model.decoder(embedding)
        for first in range(0, len(sparse), POINTS_HELD):
            passed = self._pass(first, *self._decode(decode, sparse[first : first + POINTS_HELD]))
            if passed is not None:
                yield passed

    def _decode(self, decode: Decode, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted IoUs (n, outputs) float32 and logits (n, outputs, h, w), 0 where no pixel depends on them."""
        rows, columns = self.upsampling.used_hw
        ious: list[Tensor] = []
        held: Tensor | None = None
        with half_precision(self.model.device, is_wanted=self.params.precision == "fast"):
            for first, iou, logits in decode_evenly(
                self.model,
                decode,
                sparse,
                slice(1, None),
                at_once=self.params.points_per_batch,
                used_hw=self.upsampling.used_hw,
            ):
                if held is None:
                    held = logits.new_zeros(len(sparse), logits.shape[1], *self.model.low_hw)
                held[first : first + len(iou), :, :rows, :columns] = logits[..., :rows, :columns]
                ious.append(iou.float())
        assert held is not None, "a round has points"
        return torch.cat(ious), held

    def _pass(self, first: int, ious: Tensor, logits: Tensor) -> Passed | None:
        """Filter by predicted IoU, then by stability and the crop's edge. Waits once for each. None if none passes."""
        params, outputs = self.params, ious.shape[1]
        self._finite[0] &= ious.isfinite().all()
        above = ious > params.pred_iou_thresh if params.pred_iou_thresh > 0 else torch.ones_like(ious, dtype=torch.bool)
        chosen = above.flatten().nonzero()[:, 0]
        if len(chosen) == 0:
            return None
        chosen_logits = logits.flatten(0, 1)[chosen]
        self._finite[1] &= chosen_logits.isfinite().all()
        scores = self.device_masks.score(chosen_logits, params.stability_score_offset)
        passes = torch.ones_like(chosen, dtype=torch.bool)
        if params.stability_score_thresh > 0:
            passes = scores.stability >= params.stability_score_thresh
        if self.crop_hw != self.size_hw:
            whole = [0, 0, self.size_hw[1], self.size_hw[0]]
            passes &= ~is_box_near_crop_edge(scores.boxes, list(self.crop), whole)
        passed = Passed(
            point=first + chosen // outputs,
            predicted_iou=ious.flatten()[chosen],
            stability=scores.stability,
            boxes=scores.boxes,
            logits=chosen_logits,
        )
        return passed.only(passes.nonzero()[:, 0])

    def _suppress(self, passed: Passed) -> Tensor:
        """The numbers of the kept outputs. torchvision chooses them, so equal scores have the reference's order."""
        categories = torch.zeros_like(passed.point)
        kept: Tensor = batched_nms(passed.boxes.float(), passed.predicted_iou, categories, self.params.box_nms_thresh)
        return kept

    def _to_masks(self, kept: Passed, points: NDArray[np.float64]) -> list[FoundMask]:
        """The kept masks in the frame of the image, copied to the CPU in one copy."""
        finite, numbers, ious, stabilities, changes = to_host(
            self._finite, kept.point, kept.predicted_iou, kept.stability, self.device_masks.changes(kept.logits)
        )
        self._require_finite(finite.tolist())
        runs = read_runs(changes.astype(np.int64), len(numbers), self.crop_hw)
        return [
            FoundMask(
                runs=one, predicted_iou=iou, stability_score=stability, point_xy=(x, y), crop=self.crop
            ).in_image()
            for one, iou, stability, (x, y) in zip(
                runs, ious.tolist(), stabilities.tolist(), points[numbers.astype(np.int64)].tolist(), strict=True
            )
        ]

    @staticmethod
    def _require_finite(finite: list[float]) -> None:
        for what, holds in zip(("predicted IoUs", "mask logits"), finite, strict=True):
            if not holds:
                raise ModelOutputError(f"the model's {what} hold NaN or infinity")


def _joined(rounds: list[Passed]) -> Passed:
    return Passed(**{name: torch.cat([getattr(one, name) for one in rounds]) for name in Passed.__dataclass_fields__})
