"""Whether a worker's main process counts as stuck."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tests.waiting import wait_for
from workers.running.pulse import STUCK_SECONDS, Watch
from workers.running.run_dir import pulse_file


def test_a_process_that_beats_is_never_stuck(tmp_path: Path) -> None:
    watch = Watch(tmp_path)

    for beat in range(1, 5):
        pulse_file(tmp_path).touch()
        os.utime(pulse_file(tmp_path), (beat, beat))
        assert not watch.is_stuck(STUCK_SECONDS)


def test_time_in_which_nobody_looked_does_not_count(tmp_path: Path) -> None:
    """The supervisor was frozen too: between two looks at an old file there may be hours."""
    watch = Watch(tmp_path)
    pulse_file(tmp_path).touch()
    os.utime(pulse_file(tmp_path), (1, 1))
    watch.is_stuck(0.5)

    assert not watch.is_stuck(0.5)


def test_a_process_that_waits_for_its_broker_is_not_stuck(tmp_path: Path) -> None:
    watch = Watch(tmp_path)  # this process has no broker at all

    assert not any(watch.is_stuck(10.0) for _ in range(int(STUCK_SECONDS / 10)))

    wait_for(lambda: all(thread.name != "broker" for thread in threading.enumerate()), "the broker's answer")
    assert not any(watch.is_stuck(10.0) for _ in range(int(STUCK_SECONDS / 20)))
