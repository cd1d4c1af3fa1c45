"""What can go wrong with Label Studio. Loads no HTTP client, because every command knows these errors."""

from __future__ import annotations


class LabelStudioError(RuntimeError):
    """Label Studio did not do what was asked; the message says what to fix. status: HTTP's, None without an answer."""

    def __init__(self, message: str, *, status: int | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_seconds = retry_after_seconds


class Unavailable(LabelStudioError):
    """No answer, a time-out, 429 or 5xx. It may pass; whether a write happened is unknown."""


class TooLarge(LabelStudioError):
    """The body is larger than the server, or a proxy before it, accepts. Nothing was written."""


class NotFound(LabelStudioError):
    """There is no such project, task or page."""


class Refused(LabelStudioError):
    """The server refuses, and will do so again."""
