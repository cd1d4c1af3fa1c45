"""What Postgres keeps as text: UTF-8 without NUL. Names and messages from outside may hold neither."""

from __future__ import annotations


def is_storable(text: str) -> bool:
    """Whether Postgres can keep it: no NUL, and no lone surrogate, which UTF-8 cannot say."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def storable(text: str) -> str:
    """The text with what Postgres refuses written out as escapes."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
