"""Text that Postgres can store: UTF-8 without NUL. Names and messages from outside may break both rules."""

from __future__ import annotations


def is_storable(text: str) -> bool:
    """Whether Postgres can store it: no NUL, and no lone surrogate, which UTF-8 cannot encode."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text))


def storable(text: str) -> str:
    """The text, with the characters that Postgres refuses written as escapes."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
