"""torch's compiler stays out of processes that label, and is there for those that want it."""

from __future__ import annotations

import subprocess
import sys

import pytest

LABEL = """
import sys
import numpy as np
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.params import AutomaticParams
model = load_model(find_model("sam_nano"), "cpu")
image = np.zeros((64, 64, 3), np.uint8)
[embedding] = model.embed([image])
model.automatic(image, embedding, AutomaticParams(points_per_side=2))
assert "torchvision" in sys.modules
assert "torch._dynamo" not in sys.modules
"""
COMPILE = """
import workers
import torch
from torchvision.ops import roi_align
import torch._dynamo.utils
assert torch._dynamo.utils.is_compile_supported("cpu") is not None
features, boxes = torch.arange(16.0).reshape(1, 1, 4, 4), torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]])
roi_align(features, boxes, 2).sum().item()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [LABEL, COMPILE], ids=["a worker labels without it", "torch.compile works"])
def test_the_compiler_is_imported_only_when_it_is_wanted(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
