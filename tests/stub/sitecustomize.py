"""Put on PYTHONPATH by tests, so that the real commands in real processes know one more model: `stub`."""

import hashlib
from pathlib import Path

from workers import models

_FILE = Path(__file__).with_name("stub_model.py")  # stands in for weights: present, with a size and a sha256

models.MODELS["stub"] = models.ModelSpec(
    name="stub",
    family="stub",
    loader="stub_model:load",
    weights_file=str(_FILE),
    url="https://example.invalid/none",
    sha256=hashlib.sha256(_FILE.read_bytes()).hexdigest(),
    size_bytes=_FILE.stat().st_size,
    parameter_count=0,
    prompts=("box", "points"),
    licence="Apache-2.0",
)
