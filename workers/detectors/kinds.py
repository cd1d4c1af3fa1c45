"""The kinds of detectors, and the error that says one cannot be used."""

from __future__ import annotations

from enum import StrEnum

from workers.models.spec import ModelError


class DetectorError(ModelError):
    """A detector cannot be used as asked. The message says which, what was found and what to do."""


class DetectorKind(StrEnum):
    TRANSFORMERS = "transformers"  # an object-detection checkpoint with classes of its own
    OPEN_VOCABULARY = "open-vocabulary"  # a checkpoint that boxes what phrases say
    ONNX = "onnx"  # a graph with the outputs of mmdeploy's RTMDet
