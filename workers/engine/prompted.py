"""From prompts of one image to masks, through SAM: the same answers as SamPredictor, for many prompts at once.

Prompts with the same number of points, and with or without a box, share a pass of the decoder, up to a limit. On a CPU
each mask is upsampled and thresholded alone, only inside a box found from its low-resolution logits. On a GPU all masks
of a pass are made together, and one copy brings their runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor

from workers.engine.automatic import one_thread
from workers.engine.boxed_runs import BoxedRuns, encode_runs, take_runs
from workers.engine.decoder import prompt_logits
from workers.engine.device_runs import DeviceMasks, read_runs, to_host
from workers.engine.mask_prompt import mask_input
from workers.engine.promptable import Decode, Hw, ModelOutputError, Promptable
from workers.engine.sam import promptable
from workers.engine.upsampling import Upsampling
from workers.masks import BoolMask, Mask
from workers.params import PromptParams
from workers.prompts import Prompt, asks_one_point

# sam_nano's decoder is folded here too. It is two to three times faster, and one pixel in ten thousand changes.
_AT_ONCE = 64  # prompts; their logits, 256 KiB each, are in memory together


def prompted_masks(
    sam: Sam | Promptable,
    embedding: Any,
    prompts: Sequence[Prompt],
    params: PromptParams,
    *,
    size_hw: tuple[int, int],
    decode: Decode | None = None,
) -> list[list[Mask]]:
    """The masks of each prompt, in the order of the prompts.

    A box or several points give the single-mask output. One point gives the best of three outputs by predicted IoU.
    With multimask=all every prompt gives all three. embedding: the result of `embed` for the image. size_hw: the
    image's size in pixels. prompts: boxes and points inside it. decode: the decoder that `prompt_decoder` made for this
    image, if it was kept; the embedding is then not read. Raises ModelOutputError where the model gives NaN or
    infinity.
    """
    if not prompts:
        return []
    model = promptable(sam, fold_from_dim=0)
    upsampling = model.upsampling(size_hw)
    masks_of = _masks_on_device if model.device.type == "cuda" else _masks_on_cpu
    masks: list[list[Mask]] = [[] for _ in prompts]
    image = _Image(
        decode=prompt_decoder(model, embedding) if decode is None else decode,
        size_hw=size_hw,
        # On a GPU whole frames are upsampled, so all logits are needed there.
        used_hw=model.low_hw if model.device.type == "cuda" else upsampling.used_hw,
    )
    for numbers in _decodable_together(prompts):
        logits, predicted_iou = _decode(model, image, [prompts[n] for n in numbers], params)
        runs, scores = masks_of(upsampling, model.mask_threshold, logits.flatten(0, 1), predicted_iou.flatten())
        made = [_to_mask(*one, size_hw) for one in zip(runs, scores, strict=True)]
        kept = logits.shape[1]
        for row, n in enumerate(numbers):
            masks[n] = made[row * kept : (row + 1) * kept]
    return masks


def prompt_decoder(sam: Sam | Promptable, embedding: Any, mask: BoolMask | None = None) -> Decode:
    """The decoder of one image's prompts, for `prompted_masks`. What depends on the image alone is computed here.

    mask: (H, W) bool, a mask of the image that every prompt refines: SAM's mask prompt.
    """
    model = promptable(sam, fold_from_dim=0)
    with torch.no_grad():
        return model.decoder(embedding, None if mask is None else mask_input(model, mask))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image:
    """What all prompts of an image share. used_hw: the rows and columns of the logits that the image covers."""

    decode: Decode
    size_hw: Hw
    used_hw: Hw


def _decodable_together(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Groups of prompts, by number: all with the same number of points, and all with a box or all without. Each group
    has a limited size."""
    makes: dict[tuple[int, bool], list[int]] = {}
    for number, prompt in enumerate(prompts):
        makes.setdefault((len(prompt.points), prompt.box_xyxy is not None), []).append(number)
    for (point_count, _), numbers in makes.items():
        # The memory grows with the decoder's tokens: six of its own, two for a box, and one for each point.
        step = max(1, _AT_ONCE * 8 // (8 + point_count))
        yield from (numbers[first : first + step] for first in range(0, len(numbers), step))


def _decode(model: Promptable, image: _Image, prompts: Sequence[Prompt], params: PromptParams) -> tuple[Tensor, Tensor]:
    """Decode one group of prompts: logits (n, kept, h, w) and predicted IoUs (n, kept). kept is 1 or 3."""
    one_point = asks_one_point(prompts[0])
    points = np.array([prompt.points for prompt in prompts], np.float64)
    boxes = np.array([prompt.box_xyxy for prompt in prompts]) if prompts[0].box_xyxy is not None else None
    logits, predicted_iou = prompt_logits(
        model,
        None,
        size_hw=image.size_hw,
        point_coords=points[..., :2] if points.size else None,
        point_labels=points[..., 2].astype(np.int32) if points.size else None,
        boxes_xyxy=boxes,
        multimask=one_point or params.multimask == "all",
        decode=image.decode,
        used_hw=image.used_hw,
    )
    if one_point and params.multimask == "best":
        best = predicted_iou.argmax(dim=1, keepdim=True)
        logits = logits.gather(1, best[..., None, None].expand(-1, -1, *logits.shape[2:]))
        predicted_iou = predicted_iou.gather(1, best)
    return logits, predicted_iou


def _masks_on_cpu(
    upsampling: Upsampling, threshold: float, logits: Tensor, predicted_iou: Tensor
) -> tuple[list[BoxedRuns], list[float]]:
    """The runs of the masks of logits (n, h, w) on the CPU, made one at a time, and their predicted IoUs (n,)."""
    with one_thread():
        return [_upsample_and_threshold(upsampling, threshold, one) for one in logits.numpy()], predicted_iou.tolist()


def _upsample_and_threshold(upsampling: Upsampling, threshold: float, logits: NDArray[np.float32]) -> BoxedRuns:
    try:
        patch = upsampling.patch(logits, threshold)
    except FloatingPointError as error:
        raise ModelOutputError("the model's mask logits hold NaN or infinity") from error
    if patch is None:
        return take_runs(np.zeros((0, 0), np.bool_), (0, 0))
    cut = upsampling.cut(patch, (threshold,))
    return take_runs(cut.pixels, cut.corner)


def _masks_on_device(
    upsampling: Upsampling, threshold: float, logits: Tensor, predicted_iou: Tensor
) -> tuple[list[BoxedRuns], list[float]]:
    """The same as `_masks_on_cpu`, but on the device of the logits, with one copy from it."""
    changes = DeviceMasks(upsampling=upsampling, threshold=threshold).changes(logits)
    places, scores = to_host(changes, predicted_iou)
    return read_runs(places.astype(np.int64), len(logits), upsampling.frame_hw), scores.tolist()


def _to_mask(runs: BoxedRuns, predicted_iou: float, size_hw: tuple[int, int]) -> Mask:
    """The mask in the upright image, with COCO's box. The box is zeros if the mask has no pixels."""
    x0, y0, x1, y1 = runs.box
    width, height = (x1 - x0 + 1, y1 - y0 + 1) if runs.area_px else (0, 0)
    return Mask(
        counts=encode_runs(runs, size_hw),
        size_hw=size_hw,
        bbox_xywh=(float(x0), float(y0), float(width), float(height)),
        area_px=runs.area_px,
        predicted_iou=predicted_iou,
    )
