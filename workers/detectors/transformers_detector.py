"""Detectors through transformers: all that AutoModelForObjectDetection loads (RT-DETR v2, D-FINE, RF-DETR, DETR)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from workers.detectors.checkpoint import where_to_load
from workers.detectors.detector import AskedDetector, Detection, Detector
from workers.detectors.kinds import DetectorError
from workers.images.pixels import RgbImage
from workers.models.transformers_checkpoints import LOADING_ERRORS, load_whole, require_numbers


class TransformersDetector:
    """A loaded checkpoint with its image processor. Stateless; threads may share it."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self._model = model
        self._processor = processor
        self._device = device

    def detect(self, images: Sequence[RgbImage], *, threshold: float) -> list[list[Detection]]:
        """The boxes with a score above the threshold for each image, in one pass, the best first.

        May raise torch.cuda.OutOfMemoryError. Raises ModelOutputError when scores are NaN.
        """
        inputs = self._processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        with torch.inference_mode():
            outputs = self._model(**inputs.to(self._device))
        require_numbers(outputs.logits)
        found = self._processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=[image.shape[:2] for image in images]
        )
        names = self._model.config.id2label
        return [
            [
                Detection(class_name=str(names.get(number, f"class {number}")), score=score, box_xyxy=(x0, y0, x1, y1))
                for number, score, (x0, y0, x1, y1) in zip(
                    boxes["labels"].tolist(), boxes["scores"].tolist(), boxes["boxes"].tolist(), strict=True
                )
            ]
            for boxes in found
        ]


def load(asked: AskedDetector, path: Path | None, device: str) -> Detector:
    """The checkpoint in this folder, or, when path is None, the job's commit of it on the hub: float32, frozen.

    Only safetensors are read, and no code from a checkpoint is run. Raises DetectorError when it cannot be loaded, and
    torch.cuda.OutOfMemoryError when it does not fit on the device.
    """
    where, how = where_to_load(asked, path)
    try:
        processor = AutoImageProcessor.from_pretrained(where, trust_remote_code=False, **how)
        model = load_whole(AutoModelForObjectDetection, where, how)
    except LOADING_ERRORS as error:
        raise DetectorError(f"detector {where}: transformers cannot load it: {error}") from error
    unknown = [name for name in asked.classes if name not in model.config.id2label.values()]
    if unknown:
        raise DetectorError(f"detector {where} has no class {unknown[0]!r}; it has {model.config.id2label}")
    return TransformersDetector(model.to(device).eval().requires_grad_(False), processor, device)
