"""Label Studio's two kinds of API tokens, and the header for each."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Generator
from typing import Any

import httpx

from orchestrator.label_studio.addresses import server_key
from orchestrator.label_studio.errors import Refused
from orchestrator.label_studio.refusals import error_of


class LegacyToken(httpx.Auth):
    def __init__(self, token: str) -> None:
        self._header = f"Token {token.strip()}"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = self._header
        yield request


class PersonalAccessToken(httpx.Auth):
    """A personal access token cannot be used directly. It is exchanged for access tokens, which live five minutes."""

    requires_response_body = True

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token.strip()
        self._access = ""
        self._renew_at = 0.0

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if time.monotonic() >= self._renew_at:
            self._take((yield self._exchange()))
        request.headers["Authorization"] = f"Bearer {self._access}"
        response = yield request
        if response.status_code == httpx.codes.UNAUTHORIZED:
            # The server refused before it did anything, so even a write may be sent again.
            self._take((yield self._exchange()))
            request.headers["Authorization"] = f"Bearer {self._access}"
            yield request

    def _exchange(self) -> httpx.Request:
        return httpx.Request("POST", f"{self._url}/api/token/refresh/", json={"refresh": self._token})

    def _take(self, response: httpx.Response) -> None:
        if not response.is_success:
            raise error_of(response, server_key(self._url), "/api/token/refresh/")
        try:
            self._access = response.json()["access"]
            claims = _claims(self._access)
            lifetime = float(claims.get("exp", 0)) - float(claims.get("iat", 0))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            remedy = "does MASKFLEET_LABEL_STUDIO_URL name Label Studio itself?"
            where = f"{server_key(self._url)}/api/token/refresh/"
            raise Refused(f"{where}: the answer has no access token; {remedy}") from error
        # The token's lifetime is used, not its end: the clocks of the two machines may differ.
        self._renew_at = time.monotonic() + 0.8 * (lifetime if lifetime > 0 else 300.0)


def is_web_token(token: str) -> bool:
    return token.strip().startswith("eyJ") and token.count(".") == 2


def _claims(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return claims
