"""What every reader of prompt files gives: entries. An entry is the prompts of one asset, as they stand in the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from workers.errors import SourceError
from workers.prompts import PromptError


class PromptFileError(SourceError):
    """A prompt file cannot be used at all; the message says what was found and what is expected."""


class Entry(NamedTuple):
    """Prompts of one asset, unchecked. where: file and line, for people. key: the asset's key, or what the file gives
    instead: a key without suffix, a number, a path of another machine. prompts: each in the form that `parse_prompt`
    reads, or what is wrong with it; empty if the file says that there is no object."""

    where: str
    key: str
    prompts: Sequence[object | PromptError]


class BadEntry(NamedTuple):
    """A part of the file that cannot be used for any asset, and why."""

    where: str
    why: str


class PassedOver(NamedTuple):
    """A file beside the prompts that holds no prompts: a list of images, class names, a text for people."""

    name: str


class Reader(NamedTuple):
    """A file of a known format."""

    file_format: str
    entries: Iterator[Entry | BadEntry | PassedOver]


def shown(value: object) -> str:
    """A value that was found, short and printable."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
