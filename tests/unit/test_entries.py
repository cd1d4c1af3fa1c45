"""Entries are the same wherever they are made, and the processes that make them leave nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.label_studio.config import find_controls, label_config
from orchestrator.label_studio.entries import Labeled, Plan, build_entries, entries_of
from orchestrator.label_studio.errors import LabelStudioError
from tests.waiting import wait_for
from workers.masks import Mask, encode_counts

PLAN = Plan(controls=find_controls(label_config(["object"])), as_="auto", max_masks=150, model_version="m@1+2")


def labeled(asset_id: int) -> Labeled:
    pixels = np.zeros((60, 80), bool)
    pixels[10:40, asset_id : asset_id + 20] = True
    mask = Mask(
        counts=encode_counts(pixels),
        size_hw=(60, 80),
        bbox_xywh=(asset_id, 10, 20, 30),
        area_px=600,
        predicted_iou=0.9,
    )
    return Labeled(
        asset_id=asset_id,
        asset_uid=f"uid{asset_id}",
        uri=f"s3://bucket/{asset_id}.jpg",
        address=f"s3://bucket/{asset_id}.jpg",
        task_id=None,
        size_hw=(60, 80),
        masks=[mask],
    )


def groups(count: int) -> Iterator[list[Labeled]]:
    return ([labeled(n), labeled(n + 20)] for n in range(count))


def test_processes_make_the_entries_that_are_made_here_in_the_same_order() -> None:
    made = list(entries_of(PLAN, groups(12)))

    assert made == [build_entries(PLAN, group) for group in groups(12)]
    assert made[3][0].ious == (1.0,)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core: everything is made in this process")
def test_a_killed_process_is_an_error_that_says_so_and_the_next_pass_goes_on() -> None:
    entries = entries_of(PLAN, groups(1000))
    next(entries)
    for child in multiprocessing.active_children():
        child.kill()

    with pytest.raises(LabelStudioError, match="was killed"):
        list(entries)
    assert len(list(entries_of(PLAN, groups(3)))) == 3


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core: everything is made in this process")
def test_a_process_that_was_killed_while_the_server_was_busy_is_the_same_error() -> None:
    entries = entries_of(PLAN, groups(1000))
    next(entries)
    for child in multiprocessing.active_children():
        child.kill()
    time.sleep(1)  # the pool has noticed before anything more is submitted

    with pytest.raises(LabelStudioError, match="was killed"):
        list(entries)
    assert len(list(entries_of(PLAN, groups(3)))) == 3


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core: everything is made in this process")
def test_the_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "publisher.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from tests.unit.test_entries import PLAN, entries_of, groups\n"
        "if __name__ == '__main__':\n"
        "    list(entries_of(PLAN, groups(5)))\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    ) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)

    assert children
    wait_for(lambda: not any(is_alive(pid) for pid in children), "the processes to end")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between the opening and the reading
        return False
