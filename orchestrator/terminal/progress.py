"""How far long work is: a bar in a terminal, a line every ten seconds in a pipe. Every command shows it with this."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_LINE_SECONDS = 10.0  # between lines when the output is no terminal
_DRAW_SECONDS = 0.1  # between drawings: some work is told thousands of times a second
_KNOWN_SECONDS = 30.0  # so much does a rate count that was known before, beside what is seen
Item = TypeVar("Item")

BYTES = "byte"
SECONDS = "second"  # work that takes a given time


@dataclass(slots=True)
class Pace:
    """The rate of the whole work: since its first number, which says what was done before it.

    known_rate: a second, from before this began.
    """

    known_rate: float | None = None
    began_at: float | None = None
    first: int = 0
    done: int = 0

    def see(self, done: int, now: float, *, is_waiting: bool = False) -> None:
        """done: so far. is_waiting: nobody is at work yet, so the time does not count. now: seconds of any clock."""
        if self.began_at is None or (is_waiting and done == self.first):
            self.began_at, self.first = now, done
        self.done = done

    def rate(self, now: float) -> float | None:
        """A second. None while nothing was done."""
        if self.began_at is None:
            return self.known_rate
        done, seconds = float(self.done - self.first), now - self.began_at
        if self.known_rate is not None:
            done, seconds = done + self.known_rate * _KNOWN_SECONDS, seconds + _KNOWN_SECONDS
        return done / seconds if done > 0 and seconds > 0 else None


class Bar:
    """One piece of work on the screen. Make it by `Bars.bar`."""

    def __init__(self, bars: Bars, task: TaskID, unit: str, pace: Pace) -> None:
        self._bars, self._task, self._unit, self._pace = bars, task, unit, pace
        self._note, self._line, self._drawn_at = "", "", 0.0
        self.title, self.done = "", 0
        self.total: int | None = None

    def show(
        self,
        done: int,
        total: int | None = None,
        *,
        reused: int = 0,
        is_waiting: bool = False,
        note: str = "",
        line: str = "",
    ) -> None:
        """done: so far; the first call says what was done before. total: when it is known only now.

        reused: of those done, without work. is_waiting: nobody is at work yet. note: what else there is to say.
        line: printed in a pipe in place of title, numbers and note.
        """
        self.done, self.total = done, total if total is not None else self.total
        self._pace.see(done - reused, time.monotonic(), is_waiting=is_waiting)
        self._note, self._line = note, line
        if time.monotonic() - self._drawn_at > _DRAW_SECONDS:
            self.draw()

    def advance(self, number: int) -> None:
        self.show(self.done + number)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted when the next one is asked for."""
        self.show(0)
        for item in items:
            yield item
            self.advance(1)

    def say(self, note: str) -> None:
        """Change the note alone."""
        self._note, self._line = note, ""
        self.draw()

    def draw(self) -> None:
        """Bring the newest numbers to the screen."""
        self._drawn_at = time.monotonic()
        rate = self._pace.rate(self._drawn_at)
        said = [speed(rate, self._unit)] if rate and self._unit != SECONDS else []
        if rate and self.total is not None and self.total > self.done:
            said.append(f"about {duration(round((self.total - self.done) / rate))} left")
        line = [self._line or f"{self.title}: {self._counted()}", *said, "" if self._line else self._note]
        fields: dict[str, Any] = {"counted": self._counted(), "said": ", ".join(said), "note": self._note}
        self._bars.update(self._task, self, fields, ", ".join(part for part in line if part))

    def _counted(self) -> str:
        if self._unit == BYTES:
            of = "" if self.total is None else f" of {self.total / 1e6:,.1f}"
            return f"{self.done / 1e6:,.1f}{of} MB"
        written = duration if self._unit == SECONDS else "{:,}".format
        return written(self.done) if self.total is None else f"{written(self.done)} of {written(self.total)}"


class Bars:
    """The bars of one command. Make them by `bars_on`."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._line_at = time.monotonic()
        self.all: list[Bar] = []

    def bar(self, title: str, total: int | None = None, *, unit: str = "image", known_rate: float | None = None) -> Bar:
        """unit: what is counted, in the singular, or BYTES, or SECONDS. known_rate: a second, from before this."""
        task = self._progress.add_task(title, total=None, counted="", said="", note="")
        made = Bar(self, task, unit, Pace(known_rate))
        made.title, made.total = title, total
        self.all.append(made)
        return made

    def update(self, task: TaskID, bar: Bar, fields: dict[str, Any], line: str) -> None:
        self._progress.update(task, description=bar.title, completed=bar.done, total=bar.total, **fields)
        if not self._console.is_terminal and time.monotonic() - self._line_at >= _LINE_SECONDS:
            self._line_at = time.monotonic()
            self._console.print(line, highlight=False)


@contextmanager
def bars_on(console: Console, *, is_transient: bool = False) -> Iterator[Bars]:
    """is_transient: the bars leave the screen at the end."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[counted]}"),
        TextColumn("[cyan]{task.fields[said]}"),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=is_transient) as progress:
        bars = Bars(console, progress)
        try:
            yield bars
        finally:
            for bar in bars.all:
                bar.draw()


def speed(rate: float, unit: str = "image") -> str:
    """A rate, a second, in the form that people can picture: 3.2 images a second, or 8.1 s an image."""
    if unit == BYTES:
        return f"{rate / 1e6:,.1f} MB a second"
    return f"{rate:,.1f} {unit}s a second" if rate >= 1 else f"{duration(1 / rate)} {_article(unit)} {unit}"


def _article(unit: str) -> str:
    return "an" if unit[0] in "aeiou" else "a"


def duration(seconds: float) -> str:
    """In at most two units: 8.1 s, 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
