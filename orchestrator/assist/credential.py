"""The user and the password that may use the assist service."""

from __future__ import annotations

import base64
import hmac

MIN_PASSWORD_CHARS = 16


class AssistError(Exception):
    """The service cannot start as asked. The message says why."""


class Credential:
    """The one user and password that may use the service."""

    def __init__(self, user: str, password: str) -> None:
        """Raises AssistError for a password of less than MIN_PASSWORD_CHARS characters, or a user with a colon."""
        if len(password) < MIN_PASSWORD_CHARS:
            raise AssistError(
                f"MASKFLEET_ASSIST_PASSWORD has {len(password)} characters, expected at least {MIN_PASSWORD_CHARS}: "
                "`openssl rand -hex 16` makes one"
            )
        if not user or ":" in user:
            raise AssistError("MASKFLEET_ASSIST_USER: expected a name without a colon")
        self._header = b"Basic " + base64.b64encode(f"{user}:{password}".encode())

    def fits(self, header: str) -> bool:
        """Whether an Authorization header is the right one. Takes the same time for any wrong header."""
        return hmac.compare_digest(header.encode("utf-8", "replace"), self._header)
