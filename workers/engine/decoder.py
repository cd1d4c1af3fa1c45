"""Prompts of one image to low-resolution logits and predicted IoUs, through one shared decoder, in bounded batches.

A decoder of SAM's own architecture and width is folded (`folded_decoder`): the same sums, associated otherwise. Any
other module with MaskDecoder's signature is called as it is, in the reference's own batches: the same bits. What is
not built like SAM at all says for itself how it encodes and decodes (`Promptable`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torchvision.transforms.functional import resize, to_pil_image

from workers.engine.device import DeviceFault, device_fault, free_bytes
from workers.engine.folded_decoder import FOLD_FROM_DIM, FoldedDecoder, PromptState, folds
from workers.engine.upsampling import Upsampling
from workers.images.decode import RgbImage

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]

# Prompts decoded in one go when the caller names no number: low enough for any GPU, high enough to fill it.
PROMPTS_AT_ONCE = 64

# On a GPU the prompts decoded in one go may take this part of its free memory, each this much for a logit of one
# output. By the shapes of their results in float32, SAM's decoder takes 450 (folded 390), SAM 2's 640 and SAM-HQ's
# 1,160; not measured on a device.
PART_OF_FREE_MEMORY = 0.5
BYTES_A_LOGIT = 1280

# Prompts folded in one go on a CPU: with two, every buffer (8 MiB) is reused by the allocator instead of being mapped
# and faulted in again, which with four costs a fifth more (EPYC Zen5, glibc 2.36, November 2026).
FOLDED_AT_ONCE_ON_CPU = 2

Hw = tuple[int, int]
# draw(wanted prompts (n,) bool on the CPU or None for all, rows and columns of the logits that matter) -> (numbers of
# those drawn, at least the wanted, (m,) on the CPU; their logits (m, outputs, rows, columns)); for all of them the
# device is asked nothing
Draw = Callable[[torch.Tensor | None, Hw], tuple[torch.Tensor, torch.Tensor]]
# decode(sparse embeddings (n, tokens, channels), outputs) -> (first prompt, predicted IoUs, draw) of parts of them
Decode = Callable[[torch.Tensor, slice], Iterator[tuple[int, torch.Tensor, Draw]]]


# points (n, p, 2) in pixels of the encoder's input with labels (n, p), 1 inside and 0 outside
Points = tuple[torch.Tensor, torch.Tensor]


class ModelOutputError(ValueError):
    """The model gave NaN or infinity for an image: its weights, its precision or the image's pixels are broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Some prompts. prompts: (m,) their numbers, rising. predicted_iou: (m, outputs) float32; wanted: the same shape,
    bool; logits: (m, outputs, rows, columns) float32."""

    prompts: NDArray[np.int64]
    predicted_iou: Floats
    wanted: NDArray[np.bool_]
    logits: Floats


class Promptable(Protocol):
    """What the engine needs of a model that segments what points and boxes show; for Sam itself, `promptable` gives it.

    Nobody else looks into its embedding of an image, nor into its prompts (n, tokens, channels).
    """

    @property
    def mask_threshold(self) -> float: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def low_hw(self) -> Hw:
        """Rows and columns of the logits."""
        ...

    def embed(self, images: Sequence[RgbImage], *, fast: bool) -> list[Any]:
        """Encode images (H, W, 3) uint8 RGB of any sizes, at least one, in one batch; fast: in bfloat16."""
        ...

    def input_hw(self, size_hw: Hw) -> Hw:
        """The size in which an image of size_hw pixels enters the encoder, before padding."""
        ...

    def upsampling(self, size_hw: Hw) -> Upsampling:
        """How logits become the pixels of an image of size_hw."""
        ...

    def encode_prompts(self, points: Points | None, boxes: torch.Tensor | None) -> torch.Tensor:
        """n prompts of one make. boxes: (n, 4), x0, y0, x1, y1 in pixels of the encoder's input."""
        ...

    def decoder(self, embedding: Any) -> Decode:
        """How prompts of this image are decoded. outputs: slice(0, 1) for one mask, slice(1, None) for several."""
        ...


def promptable(model: Sam | Promptable, fold_from_dim: int = FOLD_FROM_DIM) -> Promptable:
    """The model as the engine needs it. fold_from_dim: the narrowest decoder of SAM's that is folded."""
    return SamPromptable(model, fold_from_dim) if isinstance(model, Sam) else model


@dataclass(frozen=True, slots=True)
class SamPromptable:
    """segment_anything's Sam, or what is built like it."""

    sam: Sam
    fold_from_dim: int

    @property
    def mask_threshold(self) -> float:
        return float(self.sam.mask_threshold)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.sam.device
        return device

    @property
    def low_hw(self) -> Hw:
        low_hw: Hw = self.sam.prompt_encoder.mask_input_size
        return low_hw

    def embed(self, images: Sequence[RgbImage], *, fast: bool) -> list[torch.Tensor]:
        """Resized, normalised and padded as by SamPredictor.set_image, to the bit: (1, C, h, w) float32 each."""
        sizes = [self.input_hw((image.shape[0], image.shape[1])) for image in images]
        resized = [np.array(resize(to_pil_image(image), size)) for image, size in zip(images, sizes, strict=True)]
        pixels = [torch.as_tensor(image, device=self.device).permute(2, 0, 1) for image in resized]
        batch = torch.cat([self.sam.preprocess(one[None].contiguous()) for one in pixels])
        with half_precision(self.device, is_wanted=fast):
            embeddings: torch.Tensor = self.sam.image_encoder(batch)
        return [one[None] for one in embeddings.float()]

    def input_hw(self, size_hw: Hw) -> Hw:
        return input_hw(self.sam, size_hw)

    def upsampling(self, size_hw: Hw) -> Upsampling:
        return Upsampling(
            low_hw=self.low_hw,
            mid=self.sam.image_encoder.img_size,
            inside_hw=self.input_hw(size_hw),
            frame_hw=size_hw,
        )

    def encode_prompts(self, points: Points | None, boxes: torch.Tensor | None) -> torch.Tensor:
        with half_precision(self.device, is_wanted=False):  # bfloat16 tells 256 places of a side apart
            sparse: torch.Tensor = self.sam.prompt_encoder(points=points, boxes=boxes, masks=None)[0]
        return sparse

    def decoder(self, embedding: torch.Tensor) -> Decode:
        return _decoder(self.sam, embedding, self.fold_from_dim)


def input_hw(sam: Sam, size_hw: tuple[int, int]) -> tuple[int, int]:
    """The size in which an image of size_hw pixels enters the encoder, before padding.

    At least one pixel a side: the reference cannot take images thinner than half of 1 / image_encoder.img_size.
    """
    height, width = ResizeLongestSide.get_preprocess_shape(*size_hw, sam.image_encoder.img_size)
    return max(1, height), max(1, width)


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


def scale_xy(model: Promptable, size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """What pixels of the image are multiplied with to be pixels of the encoder's input, (x, y)."""
    (height, width), (new_height, new_width) = size_hw, model.input_hw(size_hw)
    return np.array([new_width / width, new_height / height])


def _decoder(sam: Sam, embedding: torch.Tensor, fold_from_dim: int) -> Decode:
    """How prompts of this image are decoded: folded where that stands for the module, else by the module itself."""
    with half_precision(sam.device, is_wanted=False):
        position = sam.prompt_encoder.get_dense_pe()
        _, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    if folds(sam.mask_decoder, from_dim=fold_from_dim):
        return _decode_folded(FoldedDecoder(sam.mask_decoder), embedding, position, dense)

    def decode(sparse: torch.Tensor, outputs: slice) -> Iterator[tuple[int, torch.Tensor, Draw]]:
        logits, iou = sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=position,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense.expand(len(sparse), -1, -1, -1),
            multimask_output=outputs.start > 0,
        )
        yield 0, iou, lambda wanted, used_hw: (torch.arange(len(logits)), logits)

    return decode


def _decode_folded(
    folded: FoldedDecoder, embedding: torch.Tensor, position: torch.Tensor, dense: torch.Tensor
) -> Decode:
    image = folded.image_keys(embedding, position, dense)

    def decode(sparse: torch.Tensor, outputs: slice) -> Iterator[tuple[int, torch.Tensor, Draw]]:
        step = len(sparse) if sparse.is_cuda else FOLDED_AT_ONCE_ON_CPU
        for first in range(0, len(sparse), step):
            state = folded.attend(image, sparse[first : first + step])

            def draw(
                wanted: torch.Tensor | None, used_hw: Hw, state: PromptState = state
            ) -> tuple[torch.Tensor, torch.Tensor]:
                used = (min(-(-used_hw[0] // 4), image.grid[0]), min(-(-used_hw[1] // 4), image.grid[1]))
                if wanted is None:
                    return torch.arange(len(state.iou)), folded.upscale(state, slice(None), outputs, image.grid, used)
                drawn = wanted.nonzero()[:, 0]
                return drawn, folded.upscale(state, drawn.to(sparse.device), outputs, image.grid, used)

            yield first, state.iou[:, outputs], draw

    return decode


def half_precision(device: torch.device, *, is_wanted: bool) -> torch.autocast:
    """Heavy products in bfloat16; sums, norms, predicted IoUs and all comparisons stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_wanted)


def _finite(values: torch.Tensor, what: str) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ModelOutputError(f"the model's {what} hold NaN or infinity")
    return values
