"""How this process writes its log: text for people or, by MASKFLEET_LOG_FORMAT, one JSON object a line.

A log holds keys of objects and messages of servers, which are foreign. In either form they cannot begin a line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any

from db.settings import settings
from workers.errors import printable, redact

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
    """One line an event, without secrets, with control characters escaped. A trace follows on indented lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(redact(super().formatMessage(record)))

    def formatException(self, ei: ExcInfo) -> str:
        lines = redact(super().formatException(ei)).split("\n")
        return "\n".join(_INDENT + printable(line) for line in lines)


def _redacted(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Take the secrets out of an event's texts."""
    return {name: redact(value) if isinstance(value, str) else value for name, value in event.items()}


def _json_formatter() -> logging.Formatter:
    """Keys: event, level, logger, timestamp (UTC); job, chunk and asset where the event is about one; exception."""
    import structlog  # imported only here: it takes a quarter of a second, and most processes log text

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
            _redacted,
            structlog.processors.JSONRenderer(),
        ],
    )
