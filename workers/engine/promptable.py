"""The interface between the mask engine and a model that answers points and boxes, and the types of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engine.upsampling import Upsampling
from workers.images.pixels import RgbImage

Floats = NDArray[np.float32]
Hw = tuple[int, int]

# mask_logits(wanted, used_hw) -> (numbers, logits). wanted: (n,) bool on the CPU, or None for all prompts. used_hw: the
# rows and columns of the logits that matter. numbers: (m,) on the CPU, the prompts with logits, at least the wanted.
# logits: (m, outputs, rows, columns). With None the CPU does not wait for the device.
MaskLogits = Callable[[torch.Tensor | None, Hw], tuple[torch.Tensor, torch.Tensor]]

# decode(sparse embeddings (n, tokens, channels), outputs) -> parts: (first prompt, predicted IoUs, mask_logits)
Decode = Callable[[torch.Tensor, slice], Iterator[tuple[int, torch.Tensor, MaskLogits]]]

# points (n, p, 2) in pixels of the encoder's input with labels (n, p), 1 inside and 0 outside
Points = tuple[torch.Tensor, torch.Tensor]


class ModelOutputError(ValueError):
    """The model gave NaN or infinity for an image. Its weights, its precision or the image's pixels are broken."""


class Promptable(Protocol):
    """A model that segments by points and boxes, as the engine needs it. For Sam itself, `promptable` makes one.

    Only the model reads its embedding of an image and its encoded prompts (n, tokens, channels).
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
        """Encode images (H, W, 3) uint8 RGB of any sizes, at least one, in one batch. fast: in bfloat16."""
        ...

    def input_hw(self, size_hw: Hw) -> Hw:
        """The size of an image of size_hw pixels at the encoder's input, before padding."""
        ...

    def upsampling(self, size_hw: Hw) -> Upsampling:
        """How logits become the pixels of an image of size_hw."""
        ...

    def encode_prompts(self, points: Points | None, boxes: torch.Tensor | None) -> torch.Tensor:
        """Encode n prompts of the same form. boxes: (n, 4), x0, y0, x1, y1 in pixels of the encoder's input."""
        ...

    def decoder(self, embedding: Any, mask_input: torch.Tensor | None = None) -> Decode:
        """Make the decoder of this image's prompts. outputs: slice(0, 1) for one mask, slice(1, None) for several.

        mask_input: (1, 1, *low_hw) logits of a mask that every prompt refines (`mask_prompt` makes them). What depends
        on the image alone is computed here, so a kept decoder answers later prompts sooner. It may be kept, and threads
        may share it.
        """
        ...


def scale_xy(model: Promptable, size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """The factors (x, y) from pixels of the image to pixels of the encoder's input."""
    (height, width), (new_height, new_width) = size_hw, model.input_hw(size_hw)
    return np.array([new_width / width, new_height / height])


def half_precision(device: torch.device, *, is_wanted: bool) -> torch.autocast:
    """Compute large products in bfloat16. Sums, norms, predicted IoUs and all comparisons stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_wanted)
