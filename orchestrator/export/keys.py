"""The keys that an export is asked for: a text file, one key a line, of any length and in any order."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

_MOST_BYTES = 1 << 14  # of a line; S3's keys have 1,024 at most, paths 4,096
_RUN_LINES = 500_000  # sorted in memory at once


class Keys:
    """The file's keys, each once and in binary order. They are sorted through files, so memory stays bounded.

    Lines end in a line feed, also after a carriage return. Empty lines are passed over. sha256: of the sorted keys.
    Raises OSError for a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: list[IO[bytes]] = []
        self._unreadable: list[int] = []  # the numbers of the first lines
        self._unreadable_count = 0
        self._missing = 0
        self._first_missing = ""
        with path.open("rb") as file:
            lines = self._lines(file)
            while run := sorted(islice(lines, _RUN_LINES), key=_without_end):
                stored = TemporaryFile()  # noqa: SIM115 (`close` closes it)
                stored.writelines(run)
                self._runs.append(stored)
        digest = hashlib.sha256()
        for key in self:
            digest.update(key.encode() + b"\n")
        self.sha256 = digest.hexdigest()

    def close(self) -> None:
        """Remove the sorted copies."""
        for run in self._runs:
            run.close()

    def __iter__(self) -> Iterator[str]:
        """Read from the beginning. One reader at a time."""
        for run in self._runs:
            run.seek(0)
        for line, _ in groupby(heapq.merge(*self._runs, key=_without_end)):
            yield _without_end(line).decode()

    def tell_missing(self, keys: list[str]) -> None:
        """Keep for the notes that these are no labeled assets of the job."""
        self._missing += len(keys)
        self._first_missing = self._first_missing or next(iter(keys), "")

    def notes(self) -> list[str]:
        """What people must know about the file at the end."""
        notes = []
        if self._missing:
            notes.append(
                f"{self._path}: {self._missing:,} keys are no labeled asset of the job (failed, pending, or spelled "
                f"otherwise); the first is {self._first_missing!r}"
            )
        if self._unreadable_count:
            notes.append(
                f"{self._path}: {self._unreadable_count:,} lines are no key: expected UTF-8 of at most {_MOST_BYTES:,} "
                f"bytes without NUL; the first is line {self._unreadable[0]}"
            )
        return notes

    def _lines(self, file: IO[bytes]) -> Iterator[bytes]:
        """Each key with a line feed at its end."""
        number = 0
        while piece := file.readline(_MOST_BYTES):
            number += 1
            too_long = len(piece) == _MOST_BYTES and not piece.endswith(b"\n")
            while too_long and not piece.endswith(b"\n") and (piece := file.readline(_MOST_BYTES)):
                pass
            key = (piece.removeprefix(b"\xef\xbb\xbf") if number == 1 else piece).rstrip(b"\r\n")
            if too_long or not _is_key(key):
                self._unreadable_count += 1
                self._unreadable = self._unreadable or [number]
            elif key:
                yield key + b"\n"


def _without_end(line: bytes) -> bytes:
    """The key alone. With its line feed, `a` would come after `a` and a tab."""
    return line[:-1]


def _is_key(line: bytes) -> bool:
    try:
        return "\0" not in line.decode()
    except UnicodeDecodeError:
        return False
