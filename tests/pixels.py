"""A mask's pixels from its run lengths, by the reference implementation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from workers.masks import BoolMask


def decode_counts(counts: str, size_hw: tuple[int, int]) -> BoolMask:
    """Decode COCO compressed run lengths to (H, W) bool."""
    decoded: NDArray[np.uint8] = coco_mask.decode({"size": list(size_hw), "counts": counts.encode("ascii")})
    return decoded.view(np.bool_)
