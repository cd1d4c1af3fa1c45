"""A model for tests of what surrounds models: masks at once, and, where a picture asks for it by its colour, trouble.

The colour of the first pixel, exact in a PNG: POISON kills the process, HANG never ends, FULL does not fit in memory,
BROKEN raises. MASKFLEET_STUB_MASKS says how many masks an image gets, one more where it was encoded fast, and
MASKFLEET_STUB_SECONDS how long it takes. While the file MASKFLEET_STUB_HOLD is there, no image is finished: a test
may then take its time to look at a job that is at work.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workers.images.pixels import RgbImage
from workers.masks import Mask, mask_from_pixels
from workers.models.spec import Embedding, ModelSpec
from workers.params import AutomaticParams, PromptParams
from workers.prompts import Prompt

POISON, HANG, FULL, BROKEN = (254, 1, 3), (1, 254, 3), (3, 1, 254), (253, 251, 7)


class StubModel:
    def __init__(self) -> None:
        self._masks = int(os.environ.get("MASKFLEET_STUB_MASKS", "2"))
        self._seconds = float(os.environ.get("MASKFLEET_STUB_SECONDS", "0"))
        self._hold = os.environ.get("MASKFLEET_STUB_HOLD")

    def embed(self, images: Sequence[RgbImage], *, fast: bool = False) -> list[Embedding]:
        if len(images) > 1 and any(tuple(image[0, 0]) == FULL for image in images):
            raise MemoryError("CUDA out of memory (a stub says)")
        return [fast] * len(images)

    def automatic(self, image: RgbImage, embedding: Embedding, params: AutomaticParams) -> list[Mask]:
        time.sleep(self._seconds)
        while self._hold and Path(self._hold).exists():
            time.sleep(0.05)
        match tuple(int(v) for v in image[0, 0]):
            case colour if colour == POISON:
                os.kill(os.getpid(), signal.SIGKILL)
            case colour if colour == HANG:
                threading.Event().wait()
            case colour if colour == FULL:
                raise MemoryError("CUDA out of memory (a stub says)")
            case colour if colour == BROKEN:
                raise ValueError("a stub was asked to fail")
        self._say_called()
        return [self._stripe(image, n) for n in range(self._masks + bool(embedding))]

    def prompted(
        self, image: RgbImage, embedding: Embedding, prompts: Sequence[Prompt], params: PromptParams
    ) -> list[list[Mask]]:
        """Each prompt's box filled, or its first point's pixel; with multimask=all three times."""
        return [[self._fill(image, prompt)] * (3 if params.multimask == "all" else 1) for prompt in prompts]

    def _fill(self, image: RgbImage, prompt: Prompt) -> Mask:
        height, width = image.shape[:2]
        pixels = np.zeros((height, width), dtype=bool)
        if prompt.box_xyxy is not None:
            x0, y0, x1, y1 = (round(v) for v in prompt.box_xyxy)
            pixels[y0:y1, x0:x1] = True
        else:
            x, y, _ = prompt.points[0]
            pixels[min(int(y), height - 1), min(int(x), width - 1)] = True
        return mask_from_pixels(pixels, predicted_iou=0.8)

    def _say_called(self) -> None:
        """Add a line to the file MASKFLEET_STUB_CALLS, so that a campaign can count what was computed twice."""
        if path := os.environ.get("MASKFLEET_STUB_CALLS"):
            with open(path, "a") as calls:  # noqa: PTH123  one write of one line, which the kernel appends whole
                calls.write(f"{os.getpid()}\n")

    def _stripe(self, image: RgbImage, n: int) -> Mask:
        height, width = image.shape[:2]
        pixels = np.zeros((height, width), dtype=bool)
        pixels[:, n % width : n % width + max(1, width // 2)] = True
        return mask_from_pixels(pixels, predicted_iou=0.9 - 0.001 * n, stability_score=0.95)


def load(spec: ModelSpec, device: str) -> StubModel:
    return StubModel()
