"""The kinds of detectors, and the error that says one cannot be used."""

from __future__ import annotations

from enum import StrEnum

from workers.models.spec import ModelError


class DetectorError(ModelError):
    """A detector cannot be used as requested. The message says which one, what was found and what to do."""


class DetectorKind(StrEnum):
    TRANSFORMERS = "transformers"  # an object-detection checkpoint with its own classes
    OPEN_VOCABULARY = "open-vocabulary"  # a checkpoint that finds boxes for phrases
    ONNX = "onnx"  # a graph with the outputs of mmdeploy's RTMDet
