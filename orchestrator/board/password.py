"""The one password of the board."""

from __future__ import annotations

import hmac
import secrets

MIN_PASSWORD_CHARS = 12


class BoardError(Exception):
    """The board cannot start as asked. The message says why."""


class Password:
    """given: the deployment's password; without one, it is made here, and `was_made` says so."""

    def __init__(self, given: str | None) -> None:
        """Raises BoardError for a password that is too short."""
        if given is not None and len(given) < MIN_PASSWORD_CHARS:
            raise BoardError(
                f"MASKFLEET_BOARD_PASSWORD has {len(given)} characters, expected at least {MIN_PASSWORD_CHARS}: "
                "`openssl rand -hex 16` makes one, and without the setting the board makes its own"
            )
        self.was_made = given is None
        self.text = secrets.token_urlsafe(12) if given is None else given

    def fits(self, tried: str) -> bool:
        """Takes the same time for any wrong password of one length."""
        return hmac.compare_digest(tried.encode("utf-8", "replace"), self.text.encode())
