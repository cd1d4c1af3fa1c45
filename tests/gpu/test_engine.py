"""The mask engine on a CUDA device. Not run so far: no GPU was at hand when it was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry

from workers.automatic import automatic_masks
from workers.params import AutomaticParams

pytestmark = pytest.mark.gpu
THRESHOLDS = {"points_per_side": 8, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0}


@pytest.fixture(scope="module")
def vit_b():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    return sam_model_registry["vit_b"]().eval().requires_grad_(False).cuda()


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (683, 1024, 3), dtype=np.uint8)


def mean_iou(masks, reference):
    ours = [{"size": m.size_hw, "counts": m.counts.encode()} for m in masks]
    theirs = [mask["segmentation"] for mask in reference]
    return float(coco_mask.iou(ours, theirs, [0] * len(theirs)).max(axis=0).mean())


@pytest.mark.parametrize(("precision", "least"), [("exact", 0.99), ("fast", 0.9)])
def test_masks_agree_with_the_references_on_the_same_device(vit_b, image, precision, least):
    reference = SamAutomaticMaskGenerator(vit_b, **THRESHOLDS, output_mode="coco_rle").generate(image)

    masks = automatic_masks(vit_b, image, AutomaticParams(**THRESHOLDS, precision=precision))

    assert mean_iou(masks, reference) >= least
