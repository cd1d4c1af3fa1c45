"""A reader of bytes from outside, and inputs for it: valid ones, damaged in ways that Hypothesis draws."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

TESTDATA = Path(os.environ.get("MASKFLEET_TESTDATA", Path(__file__).parents[3] / "shared" / "testdata"))
_MOST_SEED_BYTES = 200_000
_TELLING = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"]
_TELLING += [b"\n", b'"', b"{", b"[" * 500, b"-1", b"NaN", b"1e999", b"9" * 400, b"\xed\xa0\x80", b"\\u0000", b"null"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """read: may raise the errors in `allowed`, and no others; it stays within seconds and megabytes."""

    name: str
    read: Callable[[bytes], object]
    allowed: tuple[type[BaseException], ...]
    seeds: Callable[[], Sequence[bytes]]
    seconds: float = 10.0
    megabytes: int = 2_000

    def inputs(self) -> SearchStrategy[bytes]:
        return damaged(list(self.seeds()))


def files(folder: str, pattern: str = "*") -> list[bytes]:
    """The small files of a folder of the shared test data."""
    paths = sorted(path for path in (TESTDATA / folder).glob(pattern) if path.is_file())
    return [path.read_bytes() for path in paths if path.stat().st_size <= _MOST_SEED_BYTES]


@st.composite
def damaged(draw: DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, or a part of it, with up to eight changes."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 8))):
        at = int(draw(st.floats(0, 1)) ** 2 * len(content))  # headers are at the front
        kind = draw(st.sampled_from(["flip", "write", "insert", "drop", "cut", "repeat", "splice"]))
        length = draw(st.integers(1, 64))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "write":
            telling = draw(st.sampled_from(_TELLING) | st.binary(min_size=1, max_size=8))
            content[at : at + len(telling)] = telling
        elif kind == "insert":
            content[at:at] = draw(st.sampled_from(_TELLING) | st.binary(min_size=1, max_size=8))
        elif kind == "drop":
            del content[at : at + length]
        elif kind == "cut":
            del content[at:]
        elif kind == "repeat":
            content[at:at] = content[at : at + length] * draw(st.integers(1, 50))
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            content[at:] = other[int(draw(st.floats(0, 1)) * len(other)) :]
    return bytes(content)
