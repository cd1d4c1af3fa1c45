"""Progress that tells: the rate and the time left of the whole work, a line in a pipe, numbers that people picture."""

from __future__ import annotations

import io
import re
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console

from db.jobs import Job
from orchestrator.label_studio.report import Report
from orchestrator.terminal import progress
from orchestrator.terminal.progress import BYTES, SECONDS, Pace, bars_on, duration, speed
from orchestrator.terminal.publish import print_report


def test_the_rate_is_that_of_the_whole_work_however_slow_it_is() -> None:
    pace = Pace()
    pace.see(0, 100.0)
    assert pace.rate(160.0) is None  # nothing is done: no rate is better than a wrong one
    pace.see(2, 160.0)

    assert pace.rate(160.0) == pytest.approx(2 / 60)
    assert pace.rate(220.0) == pytest.approx(2 / 120)


def test_what_was_done_before_and_the_time_before_anybody_was_at_work_do_not_count() -> None:
    pace = Pace()
    pace.see(1000, 0.0, is_waiting=True)
    pace.see(1000, 50.0, is_waiting=True)
    pace.see(1010, 60.0)

    assert pace.rate(60.0) == pytest.approx(1.0)


def test_a_rate_that_was_known_is_told_at_once_and_gives_way_to_what_is_seen() -> None:
    pace = Pace(known_rate=4.0)
    assert pace.rate(0.0) == 4.0
    pace.see(10, 0.0)
    assert pace.rate(1.0) == pytest.approx(4.0, rel=0.1)
    pace.see(10 + 10_000, 10_000.0)
    assert pace.rate(10_000.0) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("rate", "unit", "said"),
    [
        (3.21, "image", "3.2 images a second"),
        (1 / 8.1, "image", "8.1 s an image"),
        (1 / 90, "asset", "1 min 30 s an asset"),
        (1 / 20, "task", "20 s a task"),
        (12_340_000, BYTES, "12.3 MB a second"),
    ],
)
def test_a_rate_is_said_as_people_picture_it(rate: float, unit: str, said: str) -> None:
    assert speed(rate, unit) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (8.14, "8.1 s"),
        (8, "8 s"),
        (9.6, "10 s"),
        (45, "45 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (4 * 86400 + 7200, "4 d 2 h"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def piped() -> Console:
    return Console(file=io.StringIO(), width=200)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_gets_a_line_now_and_then_and_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = piped()

    with bars_on(console) as bars:
        bar = bars.bar("job 3", 100)
        for second in range(31):
            clock[0] = float(second)
            bar.show(2 * second, note="1 failed")

    lines = text_of(console).splitlines()
    assert len(lines) == 3
    assert lines[0] == "job 3: 20 of 100, 2.0 images a second, about 40 s left, 1 failed"


def test_a_terminal_gets_the_numbers_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)

    with bars_on(console) as bars:
        bars.bar("listing", unit="object").show(12_345)
        bars.bar("weights", unit=BYTES).show(12_000_000, 375_000_000)
        bars.bar("training", unit=SECONDS).show(30, 900)

    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text_of(console))
    assert "12,345" in shown
    assert "12.0 of 375.0 MB" in shown
    assert "30 s of 15 min 0 s" in shown


def test_there_is_one_door_to_progress() -> None:
    """rich's bars show a rate of the last moments and no line in a pipe."""
    root = Path(__file__).parents[2] / "orchestrator"
    users = [path.name for path in root.rglob("*.py") if "rich.progress" in path.read_text()]
    assert users == ["progress.py"]


def test_the_version_that_people_let_a_project_show_is_printed_as_it_is() -> None:
    console = piped()
    job = Job(**dict.fromkeys((field.name for field in fields(Job)), None) | {"id": 1})  # type: ignore[arg-type]

    print_report(console, job, Report(shown_version="ours [/old]"))

    assert text_of(console) == "job 1: nothing to publish; the project shows ours [/old]\n"
