"""Put on PYTHONPATH by tests, so that the real commands in real processes know one more model: `stub`.

MASKFLEET_STUB_STUCK_SECONDS: how long a worker's main process may stand still.
"""

import hashlib
import os
from pathlib import Path

from workers.models.registry import MODELS
from workers.models.spec import ModelSpec

_FILE = Path(__file__).with_name("stub_model.py")  # stands in for weights: present, with a size and a sha256

MODELS["stub"] = ModelSpec(
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

if stuck_seconds := os.environ.get("MASKFLEET_STUB_STUCK_SECONDS"):
    from workers.running import pulse

    pulse.STUCK_SECONDS = float(stuck_seconds)
