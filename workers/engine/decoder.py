"""From prompts of one image to low-resolution logits and predicted IoUs, in batches of limited size.

A decoder with SAM's own architecture and width is folded (`folded_decoder`): it groups the same sums differently. Any
other module with MaskDecoder's signature is called unchanged, in the reference's own batches, and gives the same bits.
A model that is not built like SAM brings its own encoding and decoding (`Promptable`).
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

# Prompts decoded at once when the caller gives no number: low enough for any GPU, high enough to fill it.
PROMPTS_AT_ONCE = 64

# On a GPU the prompts decoded at once may take this part of its free memory. Each prompt counts BYTES_A_LOGIT for every
# logit of one output. By the shapes of their results in float32, SAM's decoder takes 450 bytes (folded 390), SAM 2's
# 640 and SAM-HQ's 1,160. These are not measured on a device.
PART_OF_FREE_MEMORY = 0.5
BYTES_A_LOGIT = 1280


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """The result for m prompts.

    prompts: (m,), their numbers, rising. predicted_iou: (m, outputs) float32. wanted: (m, outputs) bool. logits: (m,
    outputs, rows, columns) float32.
    """

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
    """Decode each point (n, 2), x and y in pixels of the image, as its own prompt with several outputs.

    An output is wanted when its predicted IoU is greater than least_iou; all are wanted when least_iou is 0 or less.
    used_hw: the rows and columns of the logits that the image covers; the rest may be left out. Raises ModelOutputError
    where a predicted IoU is not finite.
    """
    # float64 up to the positional encoding, as in the reference's generator
    coords = torch.as_tensor(points * scale_xy(model, size_hw), device=model.device)[:, None]
    labels = torch.ones(coords.shape[:2], dtype=torch.int, device=model.device)
    decode = model.decoder(embedding)
    for start in range(0, len(coords), at_once):
        prompts = (coords[start : start + at_once], labels[start : start + at_once])
        sparse = model.encode_prompts(prompts, None)
        for first, iou, mask_logits in decode(sparse, slice(1, None)):
            predicted_iou = _finite(iou, "predicted IoUs").float().cpu()
            wanted = predicted_iou > least_iou if least_iou > 0 else torch.ones_like(predicted_iou, dtype=torch.bool)
            if not wanted.any():
                continue
            numbers, logits = mask_logits(wanted.any(dim=1), used_hw)
            yield Decoded(
                prompts=numbers.numpy() + (start + first),
                predicted_iou=predicted_iou[numbers].numpy(),
                wanted=wanted[numbers].numpy(),
                logits=logits.float().cpu().numpy(),
            )


def decode_evenly(
    model: Promptable, decode: Decode, sparse: torch.Tensor, outputs: slice, *, at_once: int, used_hw: Hw
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Decode prompts in batches of one shape, without waiting for the device. Repeats fill up the last batch.

    Yields parts of the prompts: (first prompt, predicted IoUs (n, outputs), logits (n, outputs, rows, columns)). They
    may hold NaN or infinity. at_once: the most prompts in a batch. A batch is smaller where the device has less free
    memory, and is halved when the device runs out of memory. Raises the device's own error if not one prompt fits.
    """
    step = _even_step(len(sparse), prompts_that_fit(model, at_once))
    start = 0
    while start < len(sparse):
        batch = sparse[start : start + step]
        if len(batch) < step:
            batch = torch.cat([batch, batch[-1:].expand(step - len(batch), -1, -1)])
        try:
            parts = [(start + i, iou, mask_logits(None, used_hw)[1]) for i, iou, mask_logits in decode(batch, outputs)]
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
    """The batch size, at most at_once, that needs the fewest repeats."""
    return -(-count // -(-count // at_once)) if count else 1


# The number of prompts that fits on a device, known after it ran out of memory. Later images start with this number,
# so the warning appears once.
_found_to_fit: dict[torch.device, int] = {}


def prompts_that_fit(model: Promptable, most: int) -> int:
    """How many prompts this model decodes at once on its device: at least one, at most `most`."""
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
    decode: Decode | None = None,
    used_hw: Hw | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode n prompts of one image: (logits (n, outputs, h, w), predicted IoUs (n, outputs)), float32.

    Give points, boxes or both. point_coords: (n, p, 2), pixels of the image; every prompt has the same number of
    points. point_labels: (n, p), 1 inside, 0 outside. boxes_xyxy: (n, 4). size_hw: the image's. outputs: 3 if multimask
    else 1. fold_from_dim: the narrowest decoder that is folded. decode: the model's decoder of this embedding, if it is
    already made; the embedding is then not read. used_hw: the first rows and columns that are needed, all by default;
    others may be left out of the logits. The logits equal SamPredictor.predict's low_res_masks of each prompt alone; a
    folded decoder differs by rounding. Raises ModelOutputError where an output is not finite.
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
        decode = decode or model.decoder(embedding)
        parts = decode_evenly(model, decode, sparse, outputs, at_once=at_once, used_hw=used_hw or model.low_hw)
        _, ious, logits = zip(*parts, strict=True)
    return _finite(torch.cat(logits), "mask logits").float(), _finite(torch.cat(ious), "predicted IoUs").float()


def _finite(values: torch.Tensor, what: str) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ModelOutputError(f"the model's {what} hold NaN or infinity")
    return values
