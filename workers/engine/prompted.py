"""Prompts of one image to masks through SAM: SamPredictor's answers, decoded together and drawn only where they are.

Prompts of one make (so many points, a box or none) share a pass of the decoder, a bounded number at a time; each
mask is drawn inside the box that its low-resolution logits bound, one at a time; on a GPU all of a pass together, and
one copy brings their runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor

from workers.engine.automatic import one_thread
from workers.engine.boxed_runs import BoxedRuns, encode_runs, take_runs
from workers.engine.decoder import prompt_logits
from workers.engine.device_runs import DeviceDrawing, read_runs, to_host
from workers.engine.promptable import ModelOutputError, Promptable
from workers.engine.sam import promptable
from workers.engine.upsampling import Upsampling
from workers.masks import Mask
from workers.params import PromptParams
from workers.prompts import Prompt, asks_one_point

# sam_nano's decoder too is folded here: two to three times faster, and a pixel in ten thousand falls on the other side
# of the threshold.
_AT_ONCE = 64  # their logits, 256 KiB each, are held together


def prompted_masks(
    sam: Sam | Promptable, embedding: Any, prompts: Sequence[Prompt], params: PromptParams, *, size_hw: tuple[int, int]
) -> list[list[Mask]]:
    """The masks of each prompt, in their order: the single-mask output for a box or several points, for one point the
    best of three by predicted IoU; with multimask=all the three, whatever the prompt.

    embedding: what `embed` gave for the image, whose size is size_hw in pixels. prompts: boxes and points inside it.
    Raises ModelOutputError where the model gives NaN or infinity.
    """
    model = promptable(sam, fold_from_dim=0)
    upsampling = model.upsampling(size_hw)
    draw = _draw_there if model.device.type == "cuda" else _draw_here
    masks: list[list[Mask]] = [[] for _ in prompts]
    for numbers in _decodable_together(prompts):
        logits, predicted_iou = _decode(model, embedding, [prompts[n] for n in numbers], params, size_hw)
        runs, scores = draw(upsampling, model.mask_threshold, logits.flatten(0, 1), predicted_iou.flatten())
        drawn = [_to_mask(*one, size_hw) for one in zip(runs, scores, strict=True)]
        kept = logits.shape[1]
        for row, n in enumerate(numbers):
            masks[n] = drawn[row * kept : (row + 1) * kept]
    return masks


def _decodable_together(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """The numbers of a bounded number of prompts that have as many points each, and a box all or none."""
    makes: dict[tuple[int, bool], list[int]] = {}
    for number, prompt in enumerate(prompts):
        makes.setdefault((len(prompt.points), prompt.box_xyxy is not None), []).append(number)
    for (point_count, _), numbers in makes.items():
        # Memory goes with the decoder's tokens: six of its own, a box's two, and the points.
        step = max(1, _AT_ONCE * 8 // (8 + point_count))
        yield from (numbers[first : first + step] for first in range(0, len(numbers), step))


def _decode(
    model: Promptable, embedding: Any, prompts: Sequence[Prompt], params: PromptParams, size_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Decode prompts of one make: logits (n, kept, h, w) and predicted IoUs (n, kept), kept being 1 or 3."""
    one_point = asks_one_point(prompts[0])
    points = np.array([prompt.points for prompt in prompts], np.float64)
    boxes = np.array([prompt.box_xyxy for prompt in prompts]) if prompts[0].box_xyxy is not None else None
    logits, predicted_iou = prompt_logits(
        model,
        embedding,
        size_hw=size_hw,
        point_coords=points[..., :2] if points.size else None,
        point_labels=points[..., 2].astype(np.int32) if points.size else None,
        boxes_xyxy=boxes,
        multimask=one_point or params.multimask == "all",
    )
    if one_point and params.multimask == "best":
        best = predicted_iou.argmax(dim=1, keepdim=True)
        logits = logits.gather(1, best[..., None, None].expand(-1, -1, *logits.shape[2:]))
        predicted_iou = predicted_iou.gather(1, best)
    return logits, predicted_iou


def _draw_here(
    upsampling: Upsampling, threshold: float, logits: Tensor, predicted_iou: Tensor
) -> tuple[list[BoxedRuns], list[float]]:
    """The runs of masks whose logits (n, h, w) are on the CPU, drawn one at a time, and their predicted IoUs (n,)."""
    with one_thread():
        return [_draw(upsampling, threshold, one) for one in logits.numpy()], predicted_iou.tolist()


def _draw(upsampling: Upsampling, threshold: float, logits: NDArray[np.float32]) -> BoxedRuns:
    try:
        patch = upsampling.patch(logits, threshold)
    except FloatingPointError as error:
        raise ModelOutputError("the model's mask logits hold NaN or infinity") from error
    if patch is None:
        return take_runs(np.zeros((0, 0), np.bool_), (0, 0))
    cut = upsampling.cut(patch, (threshold,))
    return take_runs(cut.pixels, cut.corner)


def _draw_there(
    upsampling: Upsampling, threshold: float, logits: Tensor, predicted_iou: Tensor
) -> tuple[list[BoxedRuns], list[float]]:
    """As `_draw_here`, on the device of the logits, with one copy from it."""
    changes = DeviceDrawing(upsampling=upsampling, threshold=threshold).changes(logits)
    places, scores = to_host(changes, predicted_iou)
    return read_runs(places.astype(np.int64), len(logits), upsampling.frame_hw), scores.tolist()


def _to_mask(runs: BoxedRuns, predicted_iou: float, size_hw: tuple[int, int]) -> Mask:
    """The mask in the upright image; its box is COCO's, and zeros where it has no pixel."""
    x0, y0, x1, y1 = runs.box
    width, height = (x1 - x0 + 1, y1 - y0 + 1) if runs.area_px else (0, 0)
    return Mask(
        counts=encode_runs(runs, size_hw),
        size_hw=size_hw,
        bbox_xywh=(float(x0), float(y0), float(width), float(height)),
        area_px=runs.area_px,
        predicted_iou=predicted_iou,
    )
