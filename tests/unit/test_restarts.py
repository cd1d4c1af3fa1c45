"""What a worker finds in its folder when its supervisor starts it again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from db.settings import settings
from workers.machine import Device
from workers.running import devices
from workers.running.run_dir import error_file, model_file, stop_file


def test_a_worker_that_stopped_by_itself_does_not_drain_when_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three faults in a row end it by SIGTERM, and then it leaves its stop file."""
    worker = devices._worker_of(Device(name="cpu", cuda_id=""), tmp_path / "cpu")
    left = [file(worker.run_dir) for file in (stop_file, model_file, error_file)]
    for file in left:
        file.touch()
    monkeypatch.setattr(devices.subprocess, "Popen", lambda *_, **__: SimpleNamespace(pid=1))

    devices._start(worker)

    assert [file.name for file in left if file.exists()] == []


def test_a_worker_whose_weights_folder_cannot_be_read_is_still_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The system refuses so long a name, as it refuses a stale share.
    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(folder / ("w" * 300)))
    settings.cache_clear()
    worker = devices._worker_of(Device(name="cpu0"), folder / "cpu0")

    beat = devices._beat(worker)

    assert beat.name.startswith("cpu0@")
    assert list(beat.models) == []
