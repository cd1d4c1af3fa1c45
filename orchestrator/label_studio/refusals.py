"""Label Studio's refusals as errors that say what to do."""

from __future__ import annotations

import json

import httpx

from orchestrator.label_studio.errors import LabelStudioError, NotFound, Refused, TooLarge, Unavailable
from workers.errors import redact


def error_of(response: httpx.Response, url: str, path: str) -> LabelStudioError:
    """The server's refusal as one of our errors, with the remedy if we know one."""
    status, said = response.status_code, redact(_said(response))
    kind, remedy = _judge(status, said, response)
    message = f"{url}{path} answered {status}: {said}{'; ' if remedy else ''}{remedy}"
    return kind(message, status=status, retry_after_seconds=_retry_after(response))


def _judge(status: int, said: str, response: httpx.Response) -> tuple[type[LabelStudioError], str]:
    if status == httpx.codes.UNAUTHORIZED:
        return Refused, _token_remedy(said)
    if status == httpx.codes.FORBIDDEN:
        return Refused, _forbidden_remedy(said)
    if status == httpx.codes.NOT_FOUND:
        return NotFound, ""
    if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
        return TooLarge, "our requests have at most 8 MB: let the proxy before Label Studio take them"
    if status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.REQUEST_TIMEOUT) or status >= 500:
        return Unavailable, ""
    if response.is_redirect:
        return Refused, f"it sends us to {response.headers.get('location', '?')}: fix MASKFLEET_LABEL_STUDIO_URL"
    return Refused, ""


def _said(response: httpx.Response) -> str:
    """The server's own words, in one line."""
    try:
        body = response.json()
    except ValueError:
        return " ".join(response.text.split())[:200] or "nothing"
    if not isinstance(body, dict):
        return str(body)[:500]
    parts = [str(body["detail"])] if body.get("detail") else []
    errors = body.get("validation_errors") or {name: body[name] for name in body.keys() - _ENVELOPE}
    return "; ".join(parts + ([json.dumps(errors, ensure_ascii=False)[:500]] if errors else [])) or "nothing"


STORAGE_REMEDY = {
    "s3": "Label Studio itself must reach the bucket: give its server S3_ENDPOINT, AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY in its environment, or let --send-keys store ours in the project",
    "localfiles": "start Label Studio with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and "
    "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT set to a folder above the images, which it must see",
}

_ENVELOPE = {"id", "status_code", "version", "detail", "exc_info", "validation_errors", "display_context"}


def _token_remedy(said: str) -> str:
    if "legacy" in said:
        return (
            "legacy tokens are switched off in this organization: make a personal access token (Account & Settings) "
            "and set MASKFLEET_LABEL_STUDIO_API_KEY to it, or let an owner allow legacy tokens (Organization, "
            "API Tokens Settings)"
        )
    return "set MASKFLEET_LABEL_STUDIO_API_KEY to a token from Account & Settings in Label Studio"


def _forbidden_remedy(said: str) -> str:
    if "reserved network" in said or "reserved" in said.lower():
        return (
            "Label Studio refuses private addresses: give its server S3_ENDPOINT, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in its environment and add the storage without them (what `maskfleet label-studio "
            "setup` does by default), or set SSRF_PROTECTION_ENABLED=false there"
        )
    return "the token's user may not do this"


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else None
