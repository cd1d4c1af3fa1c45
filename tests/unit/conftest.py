"""Fixtures of the tests that run models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from db.settings import settings


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine small operations on two threads wait for each other."""
    from workers.engine import automatic

    with automatic.one_thread():
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of weights, empty."""
    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()
