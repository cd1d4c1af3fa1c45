"""A mask as a prompt: SAM's `mask_input`, made from the mask's pixels."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from workers.engine.promptable import Promptable
from workers.masks import BoolMask

# Logits of a pixel inside and outside: the values with which SAM 2 turns a given mask into logits (sam2_base.py,
# _use_mask_as_output: out_scale 20, out_bias -10; sigmoid(-10) is 4.5e-5).
SCALE, BIAS = 20.0, -10.0


def mask_input(model: Promptable, mask: BoolMask) -> torch.Tensor:
    """The low-resolution logits (1, 1, *model.low_hw) float32 of a mask (H, W) bool, on the model's device.

    The frame is SAM's: the image scaled like the encoder's input, at the top left; what is padding there is outside
    the mask. A cell's logit is SCALE times the covered part of it, 0..1, plus BIAS.
    """
    height, width = model.input_hw((mask.shape[0], mask.shape[1]))
    rows, columns = model.low_hw
    side = max(height, width)  # the encoder's input is a square of this side
    inside_hw = (max(1, round(height * rows / side)), max(1, round(width * columns / side)))
    covered = cv2.resize(mask.astype(np.float32), inside_hw[::-1], interpolation=cv2.INTER_AREA)
    logits = torch.full((1, 1, rows, columns), BIAS)
    logits[0, 0, : inside_hw[0], : inside_hw[1]] += SCALE * torch.from_numpy(np.asarray(covered, np.float32))
    return logits.to(model.device)
