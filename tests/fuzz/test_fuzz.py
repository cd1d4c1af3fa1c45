"""A short turn of each target of the fuzzer. `make fuzz MINUTES=30` goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.run import NAMES, in_child

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
def test_damaged_bytes_give_named_errors_within_time_and_memory(
    name: str, testdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("MASKFLEET_TESTDATA", str(testdata))
    monkeypatch.chdir(tmp_path)

    runs, find = in_child(name, examples=60, seed=1)

    assert find == ""
    assert runs >= 60
