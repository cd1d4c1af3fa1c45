"""SAM 3 through transformers: every object that a phrase names or an example shows, with a mask and a score.

Only the image detector of its checkpoint is used. Its tracker would answer points and boxes of one object; here the
segment-anything family does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workers.images.pixels import RgbImage
from workers.masks import Mask, mask_from_pixels
from workers.models.files import weights_path
from workers.models.spec import MissingLibraryError, Model, ModelSpec, WeightsError
from workers.models.transformers_checkpoints import LOADING_ERRORS, load_whole, require_numbers
from workers.models.weights import remedy, verify
from workers.params import AutomaticParams, PromptParams
from workers.prompts import Prompt, PromptError

try:
    from transformers import Sam3Model, Sam3Processor
    from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput
except ImportError as error:
    raise MissingLibraryError(
        f"sam3 needs a newer transformers ({error}): pip install --upgrade transformers"
    ) from error

_MASK_THRESHOLD = 0.5  # of a pixel's probability, as in Sam3ImageProcessor
_EXAMPLE_ALONE = "visual"  # the phrase in the model's training when only examples are given


@dataclass(frozen=True, slots=True)
class _Levels:
    """One image's pyramid from the vision encoder: for each level features and positions, (1, channels, h, w)."""

    features: tuple[torch.Tensor, ...]
    positions: tuple[torch.Tensor, ...]


class Sam3:
    """A loaded SAM 3. Stateless: every call gets its image, and threads may share the model."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self._model = model
        self._processor = processor
        self._device = device

    def embed(self, images: Sequence[RgbImage], *, fast: bool = False) -> list[_Levels]:
        """Encode (H, W, 3) uint8 RGB images of any sizes in one encoder pass.

        fast has no effect: precision is a parameter of automatic masks, which SAM 3 does not make. May raise
        torch.cuda.OutOfMemoryError; fewer images need less memory.
        """
        pixels = self._processor.image_processor(
            list(images), return_tensors="pt", input_data_format="channels_last"
        ).pixel_values
        with torch.inference_mode():
            made = self._model.get_vision_features(pixel_values=pixels.to(self._device))
        return [
            _Levels(
                tuple(level[n : n + 1] for level in made.fpn_hidden_states),
                # The library makes positions for one image, or for every image of the batch.
                tuple(level[min(n, len(level) - 1)][None] for level in made.fpn_position_encoding),
            )
            for n in range(len(images))
        ]

    def automatic(self, image: RgbImage, embedding: _Levels, params: AutomaticParams) -> list[Mask]:
        """Raises ValueError: this model needs a prompt."""
        raise ValueError("sam3 makes no masks without a prompt; expected text or an example")

    def prompted(
        self, image: RgbImage, embedding: _Levels, prompts: Sequence[Prompt], params: PromptParams
    ) -> list[list[Mask]]:
        """The masks of each prompt with a score above params.text_threshold: any number of them, the best first.

        A prompt's text and its boxes around positive and negative examples are one question. Each prompt is asked
        alone. predicted_iou is the score. Raises PromptError for a text that is too long, ModelOutputError when the
        model gives NaN, and torch.cuda.OutOfMemoryError.
        """
        return [self._prompted(image, embedding, prompt, params.text_threshold) for prompt in prompts]

    def _prompted(self, image: RgbImage, embedding: _Levels, prompt: Prompt, threshold: float) -> list[Mask]:
        size_hw = image.shape[0], image.shape[1]
        with torch.inference_mode():
            outputs = self._model(
                vision_embeds=Sam3VisionEncoderOutput(
                    fpn_hidden_states=embedding.features, fpn_position_encoding=embedding.positions
                ),
                **self._tokens(prompt.text or _EXAMPLE_ALONE),
                **self._examples(prompt, size_hw),
            )
            # The same as post_process_instance_segmentation, which would upsample all masks at once.
            scores = (outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid())[0]
            require_numbers(scores)
            numbers = [n for n in scores.argsort(descending=True, stable=True).tolist() if scores[n] > threshold]
            return [_to_mask(outputs.pred_masks[0, n], size_hw, float(scores[n])) for n in numbers]

    def _tokens(self, text: str) -> dict[str, torch.Tensor]:
        most = self._model.config.text_config.max_position_embeddings
        tokens = self._processor.tokenizer(text, padding="max_length", max_length=most, return_tensors="pt")
        length = tokens["input_ids"].shape[1]
        if length > most:
            raise PromptError(f"text: {text[:60]!r}… is {length} tokens long, expected at most {most}")
        return {name: tokens[name].to(self._device) for name in ("input_ids", "attention_mask")}

    def _examples(self, prompt: Prompt, size_hw: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The examples' boxes (1, n, 4), centre and size as fractions of the image, and their labels (1, n).

        A label is 1 for a positive example, 0 for a negative one.
        """
        shown = [(box, 1) for box in (prompt.exemplar_box_xyxy,) if box is not None]
        shown += [(box, 0) for box in (prompt.negative_box_xyxy,) if box is not None]
        if not shown:
            return {}
        height, width = size_hw
        boxes = [
            ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
            for (x0, y0, x1, y1), _ in shown
        ]
        return {
            "input_boxes": torch.tensor([boxes], dtype=torch.float32, device=self._device),
            "input_boxes_labels": torch.tensor([[meant for _, meant in shown]], device=self._device),
        }


def load(spec: ModelSpec, device: str) -> Model:
    """The checkpoint in spec's folder with its weights on `device`, in float32, frozen.

    Raises WeightsError when it is absent, damaged or another model's, and torch.cuda.OutOfMemoryError.
    """
    verified = verify(spec)
    if not verified.ok:
        raise WeightsError(f"{spec.name}: {verified.path} is {verified.found}; {remedy(spec)}")
    folder = str(weights_path(spec))
    try:
        processor = Sam3Processor.from_pretrained(folder, local_files_only=True)
        model = load_whole(Sam3Model, folder, {"local_files_only": True})
    except LOADING_ERRORS as error:
        raise WeightsError(f"{folder}: transformers cannot load it as {spec.name}: {error}; {remedy(spec)}") from error
    return Sam3(model.to(device).eval().requires_grad_(False), processor, device)


def _to_mask(logits: torch.Tensor, size_hw: tuple[int, int], score: float) -> Mask:
    """Upsample one mask's logits (h, w), which cover the whole image, to the image's size, and threshold them."""
    resized = torch.nn.functional.interpolate(
        logits.sigmoid()[None, None], size=size_hw, mode="bilinear", align_corners=False
    )
    return mask_from_pixels((resized[0, 0] > _MASK_THRESHOLD).cpu().numpy(), predicted_iou=score)
