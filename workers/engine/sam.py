"""Segment Anything as a `Promptable`: its own encoder and decoder. The decoder is folded where possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torchvision.transforms.functional import resize, to_pil_image

from workers.engine.folded_decoder import FOLD_FROM_DIM, FoldedDecoder, PromptState, folds
from workers.engine.promptable import Decode, Hw, MaskLogits, Points, Promptable, half_precision
from workers.engine.upsampling import Upsampling
from workers.images.pixels import RgbImage

# Prompts in one pass of the folded decoder on a CPU. With two, the allocator reuses every buffer (8 MiB). With four it
# maps new memory each time, and the page faults cost a fifth more time (EPYC Zen5, glibc 2.36, November 2026).
FOLDED_AT_ONCE_ON_CPU = 2


def promptable(model: Sam | Promptable, fold_from_dim: int = FOLD_FROM_DIM) -> Promptable:
    """The model as the engine needs it. fold_from_dim: the narrowest SAM decoder that is folded."""
    return SamPromptable(model, fold_from_dim) if isinstance(model, Sam) else model


@dataclass(frozen=True, slots=True)
class SamPromptable:
    """segment_anything's Sam, or a model with the same structure."""

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
        """Resize, normalise and pad exactly like SamPredictor.set_image, then encode: (1, C, h, w) float32 each."""
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
        with half_precision(self.device, is_wanted=False):  # bfloat16 has only 256 different positions along a side
            sparse: torch.Tensor = self.sam.prompt_encoder(points=points, boxes=boxes, masks=None)[0]
        return sparse

    def decoder(self, embedding: torch.Tensor, mask_input: torch.Tensor | None = None) -> Decode:
        return _decoder(self.sam, embedding, mask_input, self.fold_from_dim)


def input_hw(sam: Sam, size_hw: tuple[int, int]) -> tuple[int, int]:
    """The size of an image of size_hw pixels at the encoder's input, before padding.

    Each side has at least one pixel. The reference fails on images thinner than half of 1 / image_encoder.img_size.
    """
    height, width = ResizeLongestSide.get_preprocess_shape(*size_hw, sam.image_encoder.img_size)
    return max(1, height), max(1, width)


def _decoder(sam: Sam, embedding: torch.Tensor, mask_input: torch.Tensor | None, fold_from_dim: int) -> Decode:
    """Make the decoder of this image's prompts: folded where `folds` says so, otherwise the module itself."""
    with half_precision(sam.device, is_wanted=False):
        position = sam.prompt_encoder.get_dense_pe()
        _, dense = sam.prompt_encoder(points=None, boxes=None, masks=mask_input)
    if folds(sam.mask_decoder, from_dim=fold_from_dim):
        return _decode_folded(FoldedDecoder(sam.mask_decoder), embedding, position, dense)

    def decode(sparse: torch.Tensor, outputs: slice) -> Iterator[tuple[int, torch.Tensor, MaskLogits]]:
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

    def decode(sparse: torch.Tensor, outputs: slice) -> Iterator[tuple[int, torch.Tensor, MaskLogits]]:
        step = len(sparse) if sparse.is_cuda else FOLDED_AT_ONCE_ON_CPU
        for first in range(0, len(sparse), step):
            state = folded.attend(image, sparse[first : first + step])

            def mask_logits(
                wanted: torch.Tensor | None, used_hw: Hw, state: PromptState = state
            ) -> tuple[torch.Tensor, torch.Tensor]:
                used = (min(-(-used_hw[0] // 4), image.grid[0]), min(-(-used_hw[1] // 4), image.grid[1]))
                if wanted is None:
                    return torch.arange(len(state.iou)), folded.upscale(state, slice(None), outputs, image.grid, used)
                numbers = wanted.nonzero()[:, 0]
                return numbers, folded.upscale(state, numbers.to(sparse.device), outputs, image.grid, used)

            yield first, state.iou[:, outputs], mask_logits

    return decode
