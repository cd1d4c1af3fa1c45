"""What the mask engine needs of a model that answers points and boxes, and the words for its tensors."""

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


def scale_xy(model: Promptable, size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """What pixels of the image are multiplied with to be pixels of the encoder's input, (x, y)."""
    (height, width), (new_height, new_width) = size_hw, model.input_hw(size_hw)
    return np.array([new_width / width, new_height / height])


def half_precision(device: torch.device, *, is_wanted: bool) -> torch.autocast:
    """Heavy products in bfloat16; sums, norms, predicted IoUs and all comparisons stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_wanted)
