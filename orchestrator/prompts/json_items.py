"""The items of a list in a JSON document, one at a time, of a file of any length.

Reads what Python's json writes though it is no JSON (NaN, Infinity: they come as text) and whole numbers of any
length; both cost the fast parser, so they are tried where it gives up.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import IO, Any

import ijson
from ijson.backends import python as patient_ijson

from orchestrator.prompts.entries import PromptFileError

_BOM = codecs.BOM_UTF8
_CHUNK_BYTES = 1 << 16
# Strings are matched so that what they hold is left alone.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?Infinity|NaN', re.DOTALL)


def items(file: IO[bytes], name: str, prefix: str) -> Iterator[Any]:
    """The items at ijson's prefix, in order. Raises PromptFileError where the document is damaged."""
    given = 0
    try:
        for item in ijson.items(from_start(file), prefix, use_float=True):
            yield item
            given += 1
        return
    except (ijson.JSONError, ValueError):
        pass  # tried again below, which says what is wrong where it is damaged indeed
    try:
        patient = patient_ijson.items(_Lenient(from_start(file)), prefix, use_float=True)
        for n, item in enumerate(patient):
            if n >= given:
                yield item
    except (ijson.JSONError, ValueError, RecursionError) as error:
        raise PromptFileError(f"{name}: damaged JSON ({error}); expected a whole document") from error


def from_start(file: IO[bytes]) -> IO[bytes]:
    """The file at its first byte behind UTF-8's mark."""
    file.seek(0)
    if file.read(len(_BOM)) != _BOM:
        file.seek(0)
    return file


class _Lenient:
    """A file whose NaN and Infinity outside of strings are put in quotes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        """Some bytes, perhaps more than asked for; none at the end."""
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
    """Up to where a text can be looked at alone: it ends in no string and in no word."""
    end = 0
    for token in _TOKEN.finditer(text):
        end = token.end()
    quote = text.find(b'"', end)  # one that does not close in this text
    limit = quote if quote >= 0 else len(text)
    while limit > end and (text[limit - 1 : limit].isalpha() or text[limit - 1 : limit] == b"-"):
        limit -= 1
    return limit


def _quoted(token: re.Match[bytes]) -> bytes:
    found = token.group()
    return found if found.startswith(b'"') else b'"' + found + b'"'
