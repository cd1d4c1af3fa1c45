"""Errors of one asset, of the access to it, and of a whole source. The class decides what happens.

    Exception
    ├── AssetError      a verdict on one asset: it is stored as failed with `.kind`, the other assets continue
    ├── TransientError  a temporary problem: the chunk is released, and no asset fails
    └── SourceError     the whole source cannot be used: a person must fix something

Messages say which object, what was found, what was expected. They are stored and logged, so `redact` them first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum


class ErrorKind(StrEnum):
    """Why an asset failed. The set is fixed: Postgres, the command line and the gallery know only these kinds."""

    NOT_FOUND = "not_found"  # listed, but not there to be read: gone, or archived until it is restored
    FORBIDDEN = "forbidden"  # the store or the file's permissions do not allow reading it
    TOO_LARGE = "too_large"  # more bytes or pixels than the deployment accepts
    NOT_IMAGE = "not_image"  # not an image, or its header makes no sense
    TRUNCATED = "truncated"  # an image that is cut off or damaged
    UNSUPPORTED = "unsupported"  # an image format that is not decoded
    DECODE_TIMEOUT = "decode_timeout"  # an image that takes minutes to decode
    GPU_OOM = "gpu_oom"  # does not fit in device memory, even alone
    CRASHED_WORKER = "crashed_worker"  # crashed its worker process three times while it ran alone
    BAD_PROMPT = "bad_prompt"  # its prompt does not fit the image
    INTERNAL = "internal"  # an error in maskfleet


class AssetError(Exception):
    """A verdict on one asset. A second try would give the same result, so there is none."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[AssetError], tuple[ErrorKind, str]]:
        # Exceptions are pickled between processes. The default would call the class with the message only.
        return type(self), (self.kind, str(self))


class TransientError(Exception):
    """The network or the store failed after a limited number of tries. Nothing is known about the asset."""


class SourceError(Exception):
    """A folder or bucket cannot be used at all. The message says what to do."""


_HIDDEN = "[redacted]"
_FIELD = (
    r"(?<![a-z0-9_])[a-z0-9_-]{0,40}(?:password|passwd|pwd|passphrase|secret|secret_?access_?key|token|credential"
    r"|signature|api[_-]?key|access_?key(?:_?id)?)"
)
_VALUE = rf"(?!\s*{re.escape(_HIDDEN)})(?:'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|[^\s&,;'\"]+)"
_DSN_USER = r"\b[a-z][a-z0-9+.-]{0,30}://[^\s:/@]*"
# A port after the colon is not a password.
_DSN_PASSWORD = rf"(?!\d{{1,5}}(?:[/?#\s]|$)|\s|{re.escape(_HIDDEN)})(?:[^\s]*|[^\r\n@]{{1,128}})"
_SECRETS = (
    # Authorization: Bearer x / Token x / AWS4-HMAC-SHA256 Credential=…, also as an entry of a dict or JSON
    (rf"(authorization['\"]?\s*[:=]\s*)(?!\s*{re.escape(_HIDDEN)})(?:'[^']*'|\"[^\"]*\"|[^\r\n]+)", rf"\1{_HIDDEN}"),
    (r"\b((?:bearer|token)\s+)[a-z0-9._~+/=-]{16,}", rf"\1{_HIDDEN}"),
    # scheme://user:password@host, also with spaces in the password
    (rf"({_DSN_USER}):{_DSN_PASSWORD}@", rf"\1:{_HIDDEN}@"),
    # Azure's shared access signature, and a key in a header
    (r"([?&]sig=)[^\s&'\"]+", rf"\1{_HIDDEN}"),
    (rf"(\bx-[a-z-]{{0,30}}(?:key|token|secret)\s*:\s*){_VALUE}", rf"\1{_HIDDEN}"),
    # "password": "x" and 'token': 'x'
    (rf"(['\"]{_FIELD}['\"]\s*[:=]\s*){_VALUE}", rf"\1{_HIDDEN}"),
    # password=x, API_KEY=x, ?X-Amz-Signature=x&…, password='x y'
    (rf"({_FIELD}\s*=\s*){_VALUE}", rf"\1{_HIDDEN}"),
    (rf"(\b(?:password|passphrase|secret(?:[_-]?key)?)\s*:\s*){_VALUE}", rf"\1{_HIDDEN}"),
    # AWS key ids (long-lived, temporary), tokens of Hugging Face and GitHub, and JSON web tokens, anywhere in the text
    (r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}", _HIDDEN),
    (r"\b(?:hf_|gh[pousr]_|github_pat_)[a-z0-9_]{16,}", _HIDDEN),
    (r"\beyJ[a-z0-9_-]{8,}\.[a-z0-9_-]+(?:\.[a-z0-9_-]*)?", _HIDDEN),
)
_PATTERNS = tuple((re.compile(pattern, re.IGNORECASE), replacement) for pattern, replacement in _SECRETS)


def redact(text: str) -> str:
    """Remove everything that looks like a credential from a message, before it is stored, logged or shown.

    Covers AWS key ids and signatures, Azure's signatures, Authorization headers, fields such as `token=`, passwords in
    DSNs, web tokens, tokens of Hugging Face and GitHub. It rather removes too much: a harmless `token=7` is removed
    too. Redacting twice changes nothing.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def printable(text: str) -> str:
    """A key or message on one line, without control sequences that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def meant(name: str, known: Iterable[str]) -> str:
    """For the message about an unknown name: a question, if one of the known names is nearly the same."""
    found = get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
