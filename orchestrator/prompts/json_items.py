"""The items of a list in a JSON document, one at a time, from a file of any length.

Python's json writes NaN and Infinity, which are not JSON. They are read as text, and so are numbers too large for a
float. Whole numbers of any length are read. If the fast parser fails, a slower parser does this.
"""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Iterator
from typing import IO, Any

import ijson
from ijson.backends import python as patient_ijson

from orchestrator.prompts.entries import PromptFileError

_BOM = codecs.BOM_UTF8
_CHUNK_BYTES = 1 << 16
# Strings are matched so that their content stays unchanged. The second form is a string that the text cuts off. 1e999
# does not fit a float.
_TOKEN = re.compile(
    rb'"(?:[^"\\]|\\.)*"|"(?:[^"\\]|\\.)*\\?\Z|-?Infinity|NaN|-?[0-9]+(?:\.[0-9]+)?[eE]\+?[0-9]{3,}', re.DOTALL
)
_WORD = frozenset(b"+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def items(file: IO[bytes], name: str, prefix: str) -> Iterator[Any]:
    """The items at ijson's prefix, in order. Raises PromptFileError if the document is damaged."""
    given = 0
    try:
        for item in ijson.items(from_start(file), prefix, use_float=True):
            yield item
            given += 1
        return
    except (ijson.JSONError, ValueError):
        pass  # tried again below; if the document is damaged, that parser says where
    try:
        patient = patient_ijson.items(_Lenient(from_start(file)), prefix, use_float=True)
        for n, item in enumerate(patient):
            if n >= given:
                yield item
    except (ijson.JSONError, ValueError, RecursionError) as error:
        raise PromptFileError(f"{name}: damaged JSON ({error}); expected a whole document") from error


def from_start(file: IO[bytes]) -> IO[bytes]:
    """The file, set to the first byte after UTF-8's byte order mark."""
    file.seek(0)
    if file.read(len(_BOM)) != _BOM:
        file.seek(0)
    return file


class _Lenient:
    """A file whose NaN, Infinity and too large numbers are put in quotes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        """Some bytes, perhaps more than asked for. Empty at the end."""
        if size == 0:
            return b""
        while True:
            chunk = self._file.read(_CHUNK_BYTES)
            text = self._rest + chunk
            cut = len(text) if not chunk else _safe_end(text)
            self._rest = text[cut:]
            if cut or not chunk:
                return _TOKEN.sub(_quoted, text[:cut])


def _safe_end(text: bytes) -> int:
    """Where to cut a text so that its first part ends inside no string, no number and no word."""
    for last in deque(_TOKEN.finditer(text), maxlen=1):
        if last.group().startswith(b'"') and last.end() == len(text):
            return last.start()
    limit = len(text)
    while limit and text[limit - 1] in _WORD:
        limit -= 1
    return limit


def _quoted(token: re.Match[bytes]) -> bytes:
    found = token.group()
    return found if found.startswith(b'"') else b'"' + found + b'"'
