"""Loads and checks the models that transformers runs, from a checkpoint's folder or from the hub at a job's commit."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from workers.engine.promptable import ModelOutputError

# What from_pretrained raises when a checkpoint is damaged, another model's or of an unknown family.
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


def load_whole(auto_class: Any, where: str, how: dict[str, Any]) -> Any:
    """A checkpoint's model in float32. Raises one of LOADING_ERRORS, also when the checkpoint lacks some weights."""
    logging.disable_progress_bar()
    model, found = auto_class.from_pretrained(
        where, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **how
    )
    # transformers only warns about missing weights, and fills them with random numbers.
    missing = sorted(name for name in found["missing_keys"] if not name.endswith("num_batches_tracked"))
    if missing:
        raise ValueError(f"the weights lack {len(missing)} tensors of {type(model).__name__}, first {missing[0]}")
    return model


def require_numbers(scores: torch.Tensor) -> None:
    """Raise ModelOutputError when a score is NaN. A threshold would treat NaN like a low score."""
    if bool(torch.isnan(scores).any()):
        raise ModelOutputError("the model's scores hold NaN")
