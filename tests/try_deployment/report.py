"""The table of a trial: what was tried, what was found, how long it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("trial")


class Unexpected(AssertionError):
    """The deployment did not do what it promises."""


def expect(holds: object, found: object) -> None:
    if not holds:
        raise Unexpected(str(found))


@dataclass
class Row:
    what: str
    found: str = ""
    seconds: float | None = None
    holds: bool = True


class Report:
    """Rows, written to `file` after each, so that a trial that is stopped leaves them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows: list[Row] = []

    @property
    def failed(self) -> bool:
        return not all(row.holds for row in self._rows)

    @contextmanager
    def row(self, what: str) -> Iterator[Row]:
        """Times the block. Its caller sets `found`. What the block raises ends its part and stands in the row."""
        row = Row(what)
        began = time.monotonic()
        log.info("%s ...", what)
        try:
            yield row
        except Exception as error:
            row.holds = False
            row.found = f"{row.found} {type(error).__name__}: {error}".strip()
            raise
        finally:
            row.seconds = time.monotonic() - began
            self._add(row)

    def note(self, what: str, found: str) -> None:
        """A row without a time."""
        self._add(Row(what, found))

    def part(self, name: str, run: Callable[[], None]) -> None:
        """Run a part. Those behind it run too when it fails."""
        log.info("== %s", name)
        before = len(self._rows)
        try:
            run()
        except Exception as error:
            log.exception("the part %s ended early", name)
            if all(row.holds for row in self._rows[before:]):
                self._add(Row(name, f"{type(error).__name__}: {error}", holds=False))

    def table(self) -> str:
        lines = ["| tried | found | seconds |", "|---|---|---|"]
        for row in self._rows:
            seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
            found = " ".join(row.found.split()).replace("|", "\\|")
            lines.append(f"| {row.what} | {'' if row.holds else '**FAILED** '}{found[:600]} | {seconds} |")
        return "\n".join(lines) + "\n"

    def _add(self, row: Row) -> None:
        log.info("%s %s: %s (%.1f s)", "ok" if row.holds else "FAILED", row.what, row.found[:2000], row.seconds or 0)
        self._rows.append(row)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(self.table())
