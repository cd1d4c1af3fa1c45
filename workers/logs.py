"""How this process writes its log: text for people or, by MASKFLEET_LOG_FORMAT, one JSON object a line.

A log holds keys of objects and messages of servers, which are foreign. In either form they cannot begin a line.
"""

from __future__ import annotations

import logging
import re
import sys
from types import TracebackType

import structlog

from db.settings import settings

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_INDENT = "    "
ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def log_to_stderr() -> None:
    """Send this process's log to stderr, in the format of the settings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_json_formatter() if settings().log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


class TextFormatter(logging.Formatter):
    """One line an event, with control characters escaped. A trace follows on indented lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def formatException(self, ei: ExcInfo) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join(_INDENT + one_line(line) for line in lines)


def one_line(text: str) -> str:
    """The text with its control characters and line ends escaped."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _json_formatter() -> logging.Formatter:
    """Keys: event, level, logger, timestamp (UTC); job, chunk and asset where the event is about one; exception."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(allow=("job", "chunk", "asset", "worker")),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )
