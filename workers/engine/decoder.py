"""Prompts of one image to low-resolution logits and predicted IoUs, through one shared decoder, in bounded batches.

A decoder of SAM's own architecture and width is folded (`folded_decoder`): the same sums, associated otherwise. Any
other module with MaskDecoder's signature is called as it is, in the reference's own batches: the same bits. What is
not built like SAM at all says for itself how it encodes and decodes (`Promptable`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam

from workers.engine.device import DeviceFault, device_fault, free_bytes
from workers.engine.folded_decoder import FOLD_FROM_DIM
from workers.engine.promptable import Decode, Floats, Hw, ModelOutputError, Promptable, scale_xy
from workers.engine.sam import promptable

log = logging.getLogger(__name__)

# Prompts decoded in one go when the caller names no number: low enough for any GPU, high enough to fill it.
PROMPTS_AT_ONCE = 64

# On a GPU the prompts decoded in one go may take this part of its free memory, each this much for a logit of one
# output. By the shapes of their results in float32, SAM's decoder takes 450 (folded 390), SAM 2's 640 and SAM-HQ's
# 1,160; not measured on a device.
PART_OF_FREE_MEMORY = 0.5
BYTES_A_LOGIT = 1280


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Some prompts. prompts: (m,) their numbers, rising. predicted_iou: (m, outputs) float32; wanted: the same shape,
    bool; logits: (m, outputs, rows, columns) float32."""

    prompts: NDArray[np.int64]
    predicted_iou: Floats
    wanted: NDArray[np.bool_]
    logits: Floats


def decode_points(
    model: Promptable,
    embedding: Any,
    points: NDArray[np.float64],
    *,
    size_hw: tuple[int, int],
    at_once: int,
    least_iou: float,
    used_hw: tuple[int, int],
) -> Iterator[Decoded]:
    """Decode each point (n, 2), x and y in pixels of the image, as a prompt of its own with several outputs.

    Wanted are the outputs of a predicted IoU greater than least_iou, all when that is 0 or less. used_hw: how many rows
    and columns of the logits the image reaches; the rest may be left out. Raises ModelOutputError where a predicted IoU
    is not finite.
    """
    # float64 up to the positional encoding, as the reference's generator has them
    coords = torch.as_tensor(points * scale_xy(model, size_hw), device=model.device)[:, None]
    labels = torch.ones(coords.shape[:2], dtype=torch.int, device=model.device)
    decode = model.decoder(embedding)
    for start in range(0, len(coords), at_once):
        prompts = (coords[start : start + at_once], labels[start : start + at_once])
        sparse = model.encode_prompts(prompts, None)
        for first, iou, draw in decode(sparse, slice(1, None)):
            predicted_iou = _finite(iou, "predicted IoUs").float().cpu()
            wanted = predicted_iou > least_iou if least_iou > 0 else torch.ones_like(predicted_iou, dtype=torch.bool)
            if not wanted.any():
                continue
            drawn, logits = draw(wanted.any(dim=1), used_hw)
            yield Decoded(
                prompts=drawn.numpy() + (start + first),
                predicted_iou=predicted_iou[drawn].numpy(),
                wanted=wanted[drawn].numpy(),
                logits=logits.float().cpu().numpy(),
            )


def decode_evenly(
    model: Promptable, decode: Decode, sparse: torch.Tensor, outputs: slice, *, at_once: int, used_hw: Hw
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Decode prompts in batches of one shape, the last filled up with repeats, and wait for nothing on the way.

    Yields (first prompt, predicted IoUs (n, outputs), logits (n, outputs, rows, columns)) of parts of them, unchecked.
    at_once: the most in a batch; fewer where the device has less room, and halved where it runs out of it after all.
    Raises the device's own error where not even one fits.
    """
    step = _even_step(len(sparse), prompts_that_fit(model, at_once))
    start = 0
    while start < len(sparse):
        batch = sparse[start : start + step]
        if len(batch) < step:
            batch = torch.cat([batch, batch[-1:].expand(step - len(batch), -1, -1)])
        try:
            parts = [(start + first, iou, draw(None, used_hw)[1]) for first, iou, draw in decode(batch, outputs)]
        except (RuntimeError, MemoryError) as error:
            if device_fault(error) is not DeviceFault.OUT_OF_MEMORY or step == 1:
                raise
            _remember_too_many(model.device, step, error)
            step = _even_step(len(sparse) - start, step // 2)
            continue
        for first, iou, logits in parts:
            present = min(len(iou), len(sparse) - first)
            if present > 0:
                yield first, iou[:present], logits[:present]
        start += step


def _even_step(count: int, at_once: int) -> int:
    """The size of batches that leaves the least to fill up."""
    return -(-count // -(-count // at_once)) if count else 1


# What a device was found to hold, once it ran out of memory: later images start there, and nobody is told twice.
_found_to_fit: dict[torch.device, int] = {}


def prompts_that_fit(model: Promptable, most: int) -> int:
    """How many prompts, at least one and at most `most`, this model decodes in one go on its device."""
    most = min(most, _found_to_fit.get(model.device, most))
    free = free_bytes(model.device)
    if free is None:
        return most
    rows, columns = model.low_hw
    return max(1, min(most, int(PART_OF_FREE_MEMORY * free) // (BYTES_A_LOGIT * rows * columns)))


def _remember_too_many(device: torch.device, prompts: int, error: BaseException) -> None:
    log.warning("%s: out of memory with %d prompts at once, %d from now on: %s", device, prompts, prompts // 2, error)
    _found_to_fit[device] = prompts // 2


def prompt_logits(
    sam: Sam | Promptable,
    embedding: Any,
    *,
    size_hw: tuple[int, int],
    point_coords: NDArray[np.floating] | None = None,
    point_labels: NDArray[np.integer] | None = None,
    boxes_xyxy: NDArray[np.floating] | None = None,
    multimask: bool,
    at_once: int = PROMPTS_AT_ONCE,
    fold_from_dim: int = FOLD_FROM_DIM,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode n prompts of one image: (logits (n, outputs, h, w), predicted IoUs (n, outputs)), float32.

    point_coords: (n, p, 2) pixels of the image, every prompt with the same number of points; point_labels: (n, p), 1
    inside, 0 outside. boxes_xyxy: (n, 4). Either or both. size_hw: the image's. outputs: 3 if multimask else 1. Equal
    to SamPredictor.predict's low_res_masks of each prompt alone, where folded but for rounding. fold_from_dim: the
    narrowest decoder that is folded. Raises ModelOutputError where an output is not finite.
    """
    model = promptable(sam, fold_from_dim)
    scale = scale_xy(model, size_hw)
    points = boxes = None
    if point_coords is not None and point_labels is not None:
        coords = torch.as_tensor(point_coords * scale, dtype=torch.float, device=model.device)
        points = (coords, torch.as_tensor(point_labels, dtype=torch.int, device=model.device))
    if boxes_xyxy is not None:
        boxes = torch.as_tensor(boxes_xyxy * np.tile(scale, 2), dtype=torch.float, device=model.device)
    if points is None and boxes is None:
        raise ValueError("prompt_logits: neither points with labels nor boxes were given")
    outputs = slice(1, None) if multimask else slice(0, 1)
    with torch.no_grad():
        sparse = model.encode_prompts(points, boxes)
        parts = decode_evenly(model, model.decoder(embedding), sparse, outputs, at_once=at_once, used_hw=model.low_hw)
        _, ious, logits = zip(*parts, strict=True)
    return _finite(torch.cat(logits), "mask logits").float(), _finite(torch.cat(ious), "predicted IoUs").float()


def _finite(values: torch.Tensor, what: str) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ModelOutputError(f"the model's {what} hold NaN or infinity")
    return values
