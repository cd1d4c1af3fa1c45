"""Put on PYTHONPATH by tests, so that the real commands in real processes know one more model: `stub`.

Every Python process of a command runs this, so it imports nothing of ours: it waits until the registry is imported.
MASKFLEET_STUB_STUCK_SECONDS: how long a worker's main process may stand still.
"""

import hashlib
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path

_FILE = Path(__file__).with_name("stub_model.py")  # stands in for weights: present, with a size and a sha256


def _add_stub(registry):
    from workers.models.spec import ModelSpec

    registry.MODELS["stub"] = ModelSpec(
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


class _AfterRegistry(MetaPathFinder):
    """Finds the registry once, as Python does, and adds the stub behind its own code."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "workers.models.registry":
            return None
        sys.meta_path.remove(self)
        found = find_spec(fullname)
        run = found.loader.exec_module

        def run_and_add(module):
            run(module)
            _add_stub(module)

        found.loader.exec_module = run_and_add
        return found


sys.meta_path.insert(0, _AfterRegistry())

if stuck_seconds := os.environ.get("MASKFLEET_STUB_STUCK_SECONDS"):
    from workers.running import pulse

    pulse.STUCK_SECONDS = float(stuck_seconds)
