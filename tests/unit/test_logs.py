"""Log lines: one an event, whatever a key or a message holds."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from db.settings import settings
from workers.logs import log_to_stderr

FORGED = "a\nERROR forged: all is lost\r\x1b[31m\u2028b\x00"


@pytest.fixture(params=["text", "json"])
def log_format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    root = logging.getLogger()
    before = root.handlers, root.level
    monkeypatch.setenv("MASKFLEET_LOG_FORMAT", request.param)
    settings.cache_clear()
    log_to_stderr()
    yield request.param
    root.handlers, root.level = before
    logging.captureWarnings(False)
    monkeypatch.undo()
    settings.cache_clear()


def test_a_key_with_control_characters_stays_on_its_line(log_format: str, capfd: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()  # once more, now that stderr is captured
    logging.getLogger("workers.running.chunk").warning("asset %s", FORGED, extra={"job": 3, "chunk": 5, "asset": 7})

    [line] = capfd.readouterr().err.rstrip("\n").split("\n")

    assert line.isprintable()
    assert "forged" in line
    if log_format == "json":
        entry = json.loads(line)
        assert (entry["job"], entry["chunk"], entry["asset"]) == (3, 5, 7)
        assert (entry["event"], entry["level"], entry["logger"]) == (
            f"asset {FORGED}",
            "warning",
            "workers.running.chunk",
        )
        assert entry["timestamp"].endswith("Z")


def test_a_trace_can_forge_no_line(log_format: str, capfd: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("x").exception("a chunk failed", exc_info=sys.exc_info())

    first, *others = capfd.readouterr().err.rstrip("\n").split("\n")

    assert "a chunk failed" in first
    if log_format == "json":
        assert others == []
        assert "ValueError" in json.loads(first)["exception"]
    else:
        assert others
        assert all(line.startswith("    ") for line in others)
        assert "\x1b" not in "".join(others)
