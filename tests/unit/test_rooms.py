from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    ["orchestrator.cli.main", "orchestrator.jobs.dispatch", "orchestrator.pages.gallery", "workers.running.tasks"],
)
def test_importing_a_room_loads_no_torch(module: str) -> None:
    program = f"import {module}, sys; sys.exit('torch' in sys.modules or 'segment_anything' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0
