"""Class names from files of people and exporters: number -> name. A name keeps its number, or the file is refused.

A number without a name (an empty line, a gap) stays without a name. Later names do not move up.
"""

from __future__ import annotations

import ast
import codecs
import json
import re
from collections.abc import Mapping

MOST_CLASSES = 100_000  # a larger number in a file is a mistake, and would need a list of that length

_MOST_DEPTH = 100
_BRACKETS = re.compile(r"[\[\]{}]")
_REPEATED = "a class number comes twice, expected one name for each number"

Names = dict[int, str]


class ClassNamesError(ValueError):
    """Class names cannot be read. The message says what was found and what was expected."""


def shallow(text: str) -> str:
    """The text of a YAML file, unless its brackets are nested deeper than in any file that people write.

    PyYAML's time grows with the square of that depth: 25,000 brackets take minutes. Raises ValueError.
    """
    depth = 0
    for bracket in _BRACKETS.findall(text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        if depth > _MOST_DEPTH:
            raise ValueError(f"brackets are nested more than {_MOST_DEPTH} deep")
    return text


def decode_text(content: bytes) -> str:
    """Text of a file that may begin with UTF-8's or UTF-16's byte order mark. Lines end in \\n, \\r\\n or \\r.

    Without a mark the text must be UTF-8. Raises UnicodeDecodeError for other bytes.
    """
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf_16 else "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def names_of_lines(text: str) -> Names:
    """Names one a line, from number 0. An empty line is a number without a name."""
    # Not splitlines(): it also splits at form feeds and similar characters, and every later name would move.
    lines = (line.strip() for line in text.split("\n"))
    return checked({number: name for number, name in enumerate(lines) if name})


def names_of_literal(text: str) -> Names:
    """Names as exporters write them into a model's metadata: a list, or number -> name, in Python's or JSON's syntax.

    Raises ClassNamesError for a single string, for a bad number, and for a name that is no text.
    """
    value = _literal(text)
    if isinstance(value, list | tuple):
        return names_of_pairs(list(enumerate(value)))
    if isinstance(value, dict):
        return names_of_pairs(list(value.items()))
    raise ClassNamesError(f"{text[:80]!r}, expected a list of names, or number: name")


def names_of_pairs(pairs: list[tuple[object, object]]) -> Names:
    """Names by numbers. Numbers may be written as text. A number with None or "" has no name.

    Raises ClassNamesError for any other number or name, and for a number that comes twice.
    """
    names: dict[int, str] = {}
    seen: set[int] = set()
    for written, name in pairs:
        number = _number(written)
        if number in seen:
            raise ClassNamesError(f"class {number} comes twice, expected one name for each number")
        seen.add(number)
        if name is not None and not isinstance(name, str):
            raise ClassNamesError(f"class {number} is named {name!r}, expected text; write it in quotes")
        if name is not None and name.strip():
            names[number] = name.strip()
    return checked(names)


def checked(names: Names) -> Names:
    """Raises ClassNamesError if a number is larger than any list of classes, or if a name cannot be shown."""
    for number, name in names.items():
        if number >= MOST_CLASSES:
            raise ClassNamesError(f"class {number}, expected numbers below {MOST_CLASSES:,}")
        if "\0" in name or "\ufffd" in name:
            raise ClassNamesError(f"class {number} is named {name[:80]!r}, expected text in UTF-8")
    return names


def in_order(names: Mapping[int, str]) -> tuple[str, ...]:
    """The names of all numbers up to the last one with a name. A 7 without a name is `class 7`."""
    return tuple(names.get(number, f"class {number}") for number in range(max(names, default=-1) + 1))


def _number(written: object) -> int:
    if isinstance(written, str) and written.strip().isascii() and written.strip().isdigit() and len(written) < 20:
        return int(written)
    if isinstance(written, int) and not isinstance(written, bool) and written >= 0:
        return written
    raise ClassNamesError(f"{str(written)[:80]!r} as a class number, expected 0, 1, 2, …")


def _literal(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except ClassNamesError:
        raise
    except (ValueError, RecursionError):  # ValueError: also a number of ten thousand digits
        pass  # most exporters write Python's quotes, which JSON does not allow
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        value: object = ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if isinstance(tree, ast.Dict) and isinstance(value, dict) and len(value) < len(tree.keys):
        raise ClassNamesError(_REPEATED)
    return value


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ClassNamesError(_REPEATED)
    return dict(pairs)
