"""What every reader of prompt files gives: entries, each the prompts of one asset as they stand in the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from db.states import PromptMatch
from workers.errors import SourceError
from workers.prompts import PromptError


class PromptFileError(SourceError):
    """A prompt file cannot be used at all; the message says what was found and what is expected."""


class Entry(NamedTuple):
    """Prompts of one asset, unchecked. where: file and line, for people. prompts: each what `parse_prompt` reads,
    or what is wrong with it."""

    where: str
    key: str
    prompts: Sequence[object | PromptError]


class BadEntry(NamedTuple):
    """A part of the file that says nothing of any asset, and why."""

    where: str
    why: str


class Reader(NamedTuple):
    """A file of a known format. match: what of an asset's key its keys stand for."""

    file_format: str
    match: PromptMatch
    entries: Iterator[Entry | BadEntry]


def shown(value: object) -> str:
    """What was found, short and printable."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
