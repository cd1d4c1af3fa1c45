"""Detectors through transformers: whatever AutoModelForObjectDetection loads (RT-DETR v2, D-FINE, RF-DETR, DETR)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.utils import logging

from workers.decoder import ModelOutputError
from workers.detector_files import DetectorError
from workers.detectors import AskedDetector, Detection, Detector
from workers.images import RgbImage

# What from_pretrained raises of a checkpoint that is damaged, another model's or of an unknown family.
LOADING_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    AttributeError,
    TypeError,
    RuntimeError,
    SafetensorError,
)


class TransformersDetector:
    """A loaded checkpoint with its image processor. Stateless; threads may share it."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self._model = model
        self._processor = processor
        self._device = device

    def detect(self, images: Sequence[RgbImage], *, threshold: float) -> list[list[Detection]]:
        """The boxes scored above the threshold of each image, in one pass, the checkpoint's best first.

        May raise torch.cuda.OutOfMemoryError. Raises ModelOutputError where scores are NaN.
        """
        inputs = self._processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        with torch.inference_mode():
            outputs = self._model(**inputs.to(self._device))
        if bool(torch.isnan(outputs.logits).any()):
            raise ModelOutputError("the detector's scores hold NaN")
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
    """The checkpoint in this folder, or, where that is None, the job's commit of it on the hub: float32, frozen.

    Only safetensors are read, and no code that comes with a checkpoint is run. Raises DetectorError where it cannot be
    loaded; torch.cuda.OutOfMemoryError where the device has no room.
    """
    where, how = whence(asked, path)
    try:
        processor = AutoImageProcessor.from_pretrained(where, trust_remote_code=False, **how)
        model = load_whole(AutoModelForObjectDetection, where, how)
    except LOADING_ERRORS as error:
        raise DetectorError(f"detector {where}: transformers cannot load it: {error}") from error
    unknown = [name for name in asked.classes if name not in model.config.id2label.values()]
    if unknown:
        raise DetectorError(f"detector {where} has no class {unknown[0]!r}; it knows {model.config.id2label}")
    return TransformersDetector(model.to(device).eval().requires_grad_(False), processor, device)


def load_whole(auto_class: Any, where: str, how: dict[str, Any]) -> Any:
    """A checkpoint's model in float32, all of whose weights the checkpoint holds. Raises one of LOADING_ERRORS."""
    logging.disable_progress_bar()
    model, found = auto_class.from_pretrained(
        where, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **how
    )
    # transformers warns of these, and fills them in at random.
    missing = sorted(name for name in found["missing_keys"] if not name.endswith("num_batches_tracked"))
    if missing:
        raise ValueError(f"the weights lack {len(missing)} tensors of {type(model).__name__}, first {missing[0]}")
    return model


def whence(asked: AskedDetector, path: Path | None) -> tuple[str, dict[str, Any]]:
    """Where from_pretrained finds a job's checkpoint: its folder, or the hub at the job's commit."""
    if path is None:
        return asked.name, {"revision": asked.identity.removeprefix("commit:")}
    return str(path), {"local_files_only": True}
