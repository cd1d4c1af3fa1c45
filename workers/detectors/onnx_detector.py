"""Detectors as ONNX graphs with the outputs of mmdeploy's RTMDet export, through onnxruntime.

Input: (n, 3, h, w) float32. Outputs: `dets` (n, k, 5) or (k, 5), each with x0, y0, x1, y1 in the input's pixels and a
score; `labels` (n, k) or (k,), class numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.detectors.detector import AskedDetector, Detection, Detector
from workers.detectors.kinds import DetectorError
from workers.detectors.onnx_names import onnx_classes
from workers.images.pixels import RgbImage
from workers.models.onnx_session import open_session

# The input in RTMDet's training (mmdet's rtmdet_l_8xb32-300e_coco.py): 640 x 640, grey padding, BGR.
_SIDE = 640
_PADDING = 114
_MEAN_BGR = np.array((103.53, 116.28, 123.675), np.float32)
_STD_BGR = np.array((57.375, 57.12, 58.395), np.float32)


class OnnxDetector:
    """A loaded graph. Stateless; threads may share it."""

    def __init__(self, session: Any, classes: Sequence[str]) -> None:
        self._session = session
        self._classes = classes
        [given] = session.get_inputs()
        self._input: str = given.name
        batch, _, height, width = given.shape
        # A name or None means any number.
        self._input_hw = (height if isinstance(height, int) else _SIDE, width if isinstance(width, int) else _SIDE)
        self._at_once: int | None = batch if isinstance(batch, int) else None

    def detect(self, images: Sequence[RgbImage], *, threshold: float) -> list[list[Detection]]:
        """The boxes with a score above the threshold for each image, in the graph's order.

        Boxes with a score of NaN are kept; the caller refuses them.
        """
        inputs = [_prepare(image, self._input_hw) for image in images]
        step = self._at_once or max(1, len(inputs))
        found: list[list[Detection]] = []
        for first in range(0, len(inputs), step):
            dets, labels = self._run([pixels for pixels, _ in inputs[first : first + step]])
            for (_, scale_xy), boxes, numbers in zip(inputs[first : first + step], dets, labels, strict=False):
                found.append(self._detections(boxes, numbers, scale_xy, threshold))
        return found

    def _run(self, pixels: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Boxes (n, k, 5) and class numbers (n, k) of n inputs."""
        batch = np.stack(pixels)
        if self._at_once is not None and len(batch) < self._at_once:
            batch = np.concatenate([batch, np.repeat(batch[-1:], self._at_once - len(batch), axis=0)])
        dets, labels = self._session.run(["dets", "labels"], {self._input: batch})
        if dets.ndim == 2:
            dets, labels = dets[None], labels[None]
        if dets.shape != (len(batch), labels.shape[-1], 5) or labels.shape != dets.shape[:2]:
            raise DetectorError(
                f"dets {dets.shape} and labels {labels.shape} for {len(batch)} images, expected (n, k, 5) and (n, k)"
            )
        return dets.astype(np.float64), labels.astype(np.int64)

    def _detections(
        self, boxes: NDArray[np.float64], numbers: NDArray[np.int64], scale_xy: tuple[float, float], threshold: float
    ) -> list[Detection]:
        # TensorRT exports fill up with boxes of score 0 and class number -1. No threshold lets them pass.
        kept = ~(boxes[:, 4] <= threshold)
        scale = np.array([*scale_xy, *scale_xy])
        return [
            Detection(class_name=self._name(number), score=score, box_xyxy=(x0, y0, x1, y1))
            for number, score, (x0, y0, x1, y1) in zip(
                numbers[kept].tolist(), boxes[kept, 4].tolist(), (boxes[kept, :4] / scale).tolist(), strict=True
            )
        ]

    def _name(self, number: int) -> str:
        return self._classes[number] if 0 <= number < len(self._classes) else f"class {number}"


def load(asked: AskedDetector, path: Path | None, device: str) -> Detector:
    """The graph in this file, on a CUDA device if onnxruntime has one. Raises DetectorError for another graph."""
    if path is None:
        raise DetectorError(f"detector {asked.name}: expected an .onnx file on this machine")
    try:
        session = open_session(str(path), device)
    except Exception as error:
        raise DetectorError(f"detector {path}: onnxruntime cannot load it: {error}") from error
    _require_layout(session, path)
    return OnnxDetector(session, onnx_classes(path))


def _require_layout(session: Any, path: Path) -> None:
    given, made = session.get_inputs(), [output.name for output in session.get_outputs()]
    fits = len(given) == 1 and given[0].type == "tensor(float)" and len(given[0].shape) == 4
    if not fits or {"dets", "labels"} - set(made):
        takes = ", ".join(f"{one.name} {one.type} {one.shape}" for one in given)
        raise DetectorError(
            f"detector {path}: takes {takes} and gives {', '.join(made)}; expected one float image (n, 3, h, w) and "
            "the outputs dets and labels of mmdeploy's RTMDet"
        )


def _prepare(image: RgbImage, input_hw: tuple[int, int]) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """An image as (3, h, w) float32, and its scale factors (x, y).

    It is resized with its proportions into the upper left corner. Sizes are rounded like mmcv's rescale_size.
    """
    height, width = image.shape[:2]
    ratio = min(input_hw[0] / height, input_hw[1] / width)
    new_hw = max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5))
    resized = cv2.resize(image, (new_hw[1], new_hw[0]), interpolation=cv2.INTER_LINEAR)
    canvas = np.full((*input_hw, 3), _PADDING, np.float32)
    canvas[: new_hw[0], : new_hw[1]] = resized[..., ::-1]
    normal = (canvas - _MEAN_BGR) / _STD_BGR
    return np.ascontiguousarray(normal.transpose(2, 0, 1)), (new_hw[1] / width, new_hw[0] / height)
