"""Prompts of one image to low-resolution logits and predicted IoUs, through one shared decoder, in bounded batches.

The module is called as it is, in the reference's own batches, so that its outputs are the reference's to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

Floats = NDArray[np.float32]

# Prompts decoded in one go when the caller names no number: low enough for any GPU, high enough to fill it.
PROMPTS_AT_ONCE = 64


class ModelOutputError(ValueError):
    """The model gave NaN or infinity for an image: its weights, its precision or the image's pixels are broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A batch of prompts. first: the number of its first prompt. predicted_iou: (n, outputs) float32, wanted: the same
    shape, bool. logits: (n, outputs, h, w) float32, valid where wanted."""

    first: int
    predicted_iou: Floats
    wanted: NDArray[np.bool_]
    logits: Floats


def input_hw(sam: Sam, size_hw: tuple[int, int]) -> tuple[int, int]:
    """The size in which an image of size_hw pixels enters the encoder, before padding.

    At least one pixel a side: the reference cannot take images thinner than half of 1 / image_encoder.img_size.
    """
    height, width = ResizeLongestSide.get_preprocess_shape(*size_hw, sam.image_encoder.img_size)
    return max(1, height), max(1, width)


def decode_points(
    sam: Sam,
    embedding: torch.Tensor,
    points: NDArray[np.float64],
    *,
    size_hw: tuple[int, int],
    at_once: int,
    least_iou: float,
) -> Iterator[Decoded]:
    """Decode each point (n, 2), x and y in pixels of the image, as a prompt of its own with several outputs.

    Wanted are the outputs of a predicted IoU greater than least_iou, all when that is 0 or less. Raises
    ModelOutputError where a predicted IoU is not finite.
    """
    # float64 up to the positional encoding, as the reference's generator has them
    coords = torch.as_tensor(points * _scale_xy(sam, size_hw), device=embedding.device)[:, None]
    labels = torch.ones(coords.shape[:2], dtype=torch.int, device=embedding.device)
    for first in range(0, len(coords), at_once):
        prompts = (coords[first : first + at_once], labels[first : first + at_once])
        sparse, dense = sam.prompt_encoder(points=prompts, boxes=None, masks=None)
        logits, iou = _decode(sam, embedding, sparse, dense, multimask=True)
        predicted_iou = _finite(iou, "predicted IoUs").cpu()
        wanted = predicted_iou > least_iou if least_iou > 0 else torch.ones_like(predicted_iou, dtype=torch.bool)
        yield Decoded(
            first=first,
            predicted_iou=predicted_iou.numpy(),
            wanted=wanted.numpy(),
            logits=logits.float().cpu().numpy(),
        )


def prompt_logits(
    sam: Sam,
    embedding: torch.Tensor,
    *,
    size_hw: tuple[int, int],
    point_coords: NDArray[np.floating] | None = None,
    point_labels: NDArray[np.integer] | None = None,
    boxes_xyxy: NDArray[np.floating] | None = None,
    multimask: bool,
    at_once: int = PROMPTS_AT_ONCE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode n prompts of one image: (logits (n, outputs, h, w), predicted IoUs (n, outputs)), float32.

    point_coords: (n, p, 2) pixels of the image, every prompt with the same number of points; point_labels: (n, p), 1
    inside, 0 outside. boxes_xyxy: (n, 4). Either or both. size_hw: the image's. outputs: 3 if multimask else 1. Equal
    to SamPredictor.predict's low_res_masks of each prompt alone. Raises ModelOutputError where an output is not finite.
    """
    scale = _scale_xy(sam, size_hw)
    points = boxes = None
    if point_coords is not None and point_labels is not None:
        coords = torch.as_tensor(point_coords * scale, dtype=torch.float, device=embedding.device)
        points = (coords, torch.as_tensor(point_labels, dtype=torch.int, device=embedding.device))
    if boxes_xyxy is not None:
        boxes = torch.as_tensor(boxes_xyxy * np.tile(scale, 2), dtype=torch.float, device=embedding.device)
    if points is None and boxes is None:
        raise ValueError("prompt_logits: neither points with labels nor boxes were given")
    parts = []
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
        for first in range(0, len(sparse), at_once):
            part = slice(first, first + at_once)
            parts.append(_decode(sam, embedding, sparse[part], dense[part], multimask=multimask))
    logits, iou = (torch.cat(batches) for batches in zip(*parts, strict=True))
    return _finite(logits, "mask logits").float(), _finite(iou, "predicted IoUs").float()


def _scale_xy(sam: Sam, size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """What pixels of the image are multiplied with to be pixels of the encoder's input, (x, y)."""
    (height, width), (new_height, new_width) = size_hw, input_hw(sam, size_hw)
    return np.array([new_width / width, new_height / height])


def _decode(
    sam: Sam, embedding: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor, *, multimask: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    logits, iou = sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )
    return logits, iou


def _finite(values: torch.Tensor, what: str) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ModelOutputError(f"the model's {what} hold NaN or infinity")
    return values
