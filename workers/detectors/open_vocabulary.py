"""Detectors for phrases through transformers: Grounding DINO and OWL-ViT v1 and v2. Each phrase is asked alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from workers.detectors.checkpoint import where_to_load
from workers.detectors.detector import AskedDetector, Detection, PhraseDetector
from workers.detectors.kinds import DetectorError
from workers.images.pixels import RgbImage
from workers.models.transformers_checkpoints import LOADING_ERRORS, load_whole, require_numbers
from workers.prompts import PromptError

_MOST_OWL_SIDE_PX = 4096  # 4 s and 1.4 GB on two cores; twice the side takes more than ten times as long (2026-11)
_PHRASES_AT_ONCE = 4  # Grounding DINO processes the image again for each phrase, so this is its batch size


class GroundingDino:
    """A loaded Grounding DINO with its processor.

    Its text and image attend to each other, so phrases in one caption would affect each other. So each phrase gets its
    own caption and its own row of the batch.
    """

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self._model = model
        self._processor = processor
        self._device = device

    def find(self, image: RgbImage, phrases: Sequence[str], *, threshold: float) -> list[list[Detection]]:
        """The boxes scored above the threshold for each phrase. Raises PromptError for a phrase that is too long."""
        _require_short(self._processor.tokenizer, phrases, self._model.config.max_text_len)
        pixels = self._processor.image_processor(
            images=[image], return_tensors="pt", input_data_format="channels_last"
        ).to(self._device)
        found: list[list[Detection]] = []
        for first in range(0, len(phrases), _PHRASES_AT_ONCE):
            found += self._find(image, pixels, phrases[first : first + _PHRASES_AT_ONCE], threshold)
        return found

    def _find(self, image: RgbImage, pixels: Any, phrases: Sequence[str], threshold: float) -> list[list[Detection]]:
        # In training its captions had lower case and a full stop at the end.
        captions = [f"{phrase.strip().lower().rstrip('.')}." for phrase in phrases]
        tokens = self._processor.tokenizer(
            captions, padding=True, return_tensors="pt", return_token_type_ids=True, return_attention_mask=True
        ).to(self._device)
        repeated = {name: value.expand(len(phrases), *value.shape[1:]) for name, value in pixels.items()}
        with torch.inference_mode():
            outputs = self._model(**repeated, **tokens)
        require_numbers(outputs.logits)
        boxes = self._processor.post_process_grounded_object_detection(
            outputs,
            tokens["input_ids"],
            threshold=threshold,
            target_sizes=[image.shape[:2]] * len(phrases),
        )
        return [_detections(phrase, one) for phrase, one in zip(phrases, boxes, strict=True)]


class Owl:
    """A loaded OWL-ViT or OWLv2 with its processor. In one pass it scores each phrase independently of the others."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self._model = model
        self._processor = processor
        self._device = device

    def find(self, image: RgbImage, phrases: Sequence[str], *, threshold: float) -> list[list[Detection]]:
        """The boxes scored above the threshold for each phrase. Raises PromptError for a phrase that is too long."""
        most = self._model.config.text_config.max_position_embeddings
        _require_short(self._processor.tokenizer, phrases, most)
        pixels = self._processor.image_processor(
            images=[_small_enough(image)], return_tensors="pt", input_data_format="channels_last"
        )
        tokens = self._processor.tokenizer(list(phrases), padding="max_length", max_length=most, return_tensors="pt")
        with torch.inference_mode():
            outputs = self._model(**pixels.to(self._device), **tokens.to(self._device))
        require_numbers(outputs.logits)
        found = []
        for number, phrase in enumerate(phrases):
            # With several phrases the library would keep only the best phrase of each box.
            one = type(outputs)(logits=outputs.logits[..., number : number + 1], pred_boxes=outputs.pred_boxes)
            [boxes] = self._processor.image_processor.post_process_object_detection(
                one, threshold=threshold, target_sizes=[image.shape[:2]]
            )
            found.append(_detections(phrase, boxes))
        return found


_FAMILIES: dict[str, Callable[[Any, Any, str], PhraseDetector]] = {
    "grounding-dino": GroundingDino,
    "mm-grounding-dino": GroundingDino,
    "owlvit": Owl,
    "owlv2": Owl,
}


def load(asked: AskedDetector, path: Path | None, device: str) -> PhraseDetector:
    """Like `transformers_detector.load`, for a checkpoint that takes phrases."""
    where, how = where_to_load(asked, path)
    try:
        processor = AutoProcessor.from_pretrained(where, trust_remote_code=False, **how)
        model = load_whole(AutoModelForZeroShotObjectDetection, where, how)
        family = _FAMILIES[model.config.model_type]
    except LOADING_ERRORS as error:
        raise DetectorError(f"detector {where}: transformers cannot load it: {error}") from error
    return family(model.to(device).eval().requires_grad_(False), processor, device)


def _small_enough(image: RgbImage) -> RgbImage:
    """The image, its longer side at most _MOST_OWL_SIDE_PX pixels.

    OWLv2's processor pads an image to a square of its longer side, in float32, and blurs that before it shrinks it to
    960 pixels. Its boxes are fractions of the square, so they do not depend on the size.
    """
    height, width = image.shape[:2]
    scale = _MOST_OWL_SIDE_PX / max(height, width)
    if scale >= 1:
        return image
    size_wh = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA), np.uint8)


def _detections(phrase: str, boxes: Any) -> list[Detection]:
    return [
        Detection(class_name=phrase, score=score, box_xyxy=(x0, y0, x1, y1))
        for score, (x0, y0, x1, y1) in zip(boxes["scores"].tolist(), boxes["boxes"].tolist(), strict=True)
    ]


def _require_short(tokenizer: Any, phrases: Sequence[str], most: int) -> None:
    for phrase in phrases:
        tokens = len(tokenizer(phrase)["input_ids"])
        if tokens > most:
            raise PromptError(f"text: {phrase[:60]!r}… is {tokens} tokens long, expected at most {most}")
