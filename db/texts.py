"""Text that Postgres can store: UTF-8 without NUL. Names and messages from outside may break both rules."""

from __future__ import annotations

_MOST_KEY_BYTES = 2600  # a row of a B-tree has 2,704 bytes at most


def is_storable(text: str) -> bool:
    """Whether Postgres can store it: no NUL, and no lone surrogate, which UTF-8 cannot encode."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text))


def is_storable_key(key: str) -> bool:
    """Whether Postgres can store it and find it by an index. S3's keys are shorter, a path may be longer."""
    return is_storable(key) and len(key.encode()) <= _MOST_KEY_BYTES


def storable(text: str) -> str:
    """The text, with the characters that Postgres refuses written as escapes."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
