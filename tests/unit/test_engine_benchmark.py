"""The GPU part of tests/benchmarks/engine.py on a CPU: what it would measure, it measures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.benchmarks import engine
from workers.engine import sam as engine_sam
from workers.engine.folded_decoder import FoldedDecoder, folds
from workers.params import AutomaticParams

pytestmark = pytest.mark.slow


@pytest.fixture
def _decoder_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark, a process of its own otherwise, puts the scene into the engine."""
    monkeypatch.setattr(engine_sam, "folds", folds)
    monkeypatch.setattr(engine_sam, "FoldedDecoder", FoldedDecoder)


@pytest.mark.usefixtures("_decoder_as_it_was")
def test_gpu_rows_time_four_sides_and_hold_them_against_floor_and_agreement() -> None:
    sam = engine.tiny_sam(scene=False, side_px=256)  # a sixteenth of SAM's pixels: bfloat16 is slow on most CPUs
    engine.plant(sam)
    params = AutomaticParams(points_per_side=3)

    rows = engine.gpu_rows("tiny", sam, engine.photo(96, 64), params, repeat=1, matmul=64)

    by_name = {row.name.removeprefix("tiny: "): row for row in rows}
    assert [f"{side}, times the reference" in by_name for side in engine.SIDES] == [True] * 4
    assert by_name["exact, times the reference"].bar == 3.5
    assert by_name["fast, times the reference"].bar == 15
    assert by_name["fast, times the floor"].value > 0
    assert by_name["exact, mean IoU of matched masks"].value == 1
    assert by_name["fast, mean IoU of matched masks"].value > 0.9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which would be measured")
def test_without_a_cuda_device_the_sections_say_that_they_were_skipped() -> None:
    command = [sys.executable, engine.__file__, "--section", "gpu_vit_b", "--json"]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    [row] = json.loads(done.stdout)["bars"]
    assert (row["value"], row["note"]) == (None, "skipped, no CUDA device")
