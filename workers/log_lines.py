"""Log records as lines that an operator can trust: without secrets, and without line breaks or control characters.

Keys of assets and messages of servers come from outside. With a line break or an escape sequence in it, such a text
could forge a line or change a terminal.
"""

from __future__ import annotations

import logging

from workers.errors import redact

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LineFormatter(logging.Formatter):
    """One line a record. Only a traceback has more lines, and each of these begins with spaces."""

    def format(self, record: logging.LogRecord) -> str:
        first, *rest = redact(super().format(record)).split("\n" if record.exc_info else "\0")
        return "\n".join([printable(first), *(f"    {printable(line)}" for line in rest)])


def log_to_stderr() -> None:
    """Send the log of this process to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def printable(text: str) -> str:
    """A key or message without control sequences that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
