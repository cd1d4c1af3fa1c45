"""What can go wrong with one asset, with the road to it, and with a whole source: the class decides the policy.

    Exception
    ├── AssetError      a verdict on one asset: it is recorded as failed with `.kind`, its neighbours go on
    ├── TransientError  nobody's fault and may pass: the chunk goes back, no asset is condemned
    └── SourceError     the source as a whole cannot be used: a person has to mend something

Messages say which object, what was found, what was expected. They are stored and logged, so `redact` them first.
"""

from __future__ import annotations

import re
from enum import StrEnum


class ErrorKind(StrEnum):
    """Why an asset failed. The set is closed: Postgres, the command line and the gallery know these and no others."""

    NOT_FOUND = "not_found"  # listed, and not there to be read: gone, or archived until it is restored
    FORBIDDEN = "forbidden"  # the store, or the file's permissions, refuse to hand it out
    TOO_LARGE = "too_large"  # more bytes or pixels than the deployment accepts
    NOT_IMAGE = "not_image"  # bytes that are no picture, or whose header makes no sense
    TRUNCATED = "truncated"  # a picture whose bytes end too early or are damaged
    UNSUPPORTED = "unsupported"  # a picture of a kind that the decoding policy leaves out
    DECODE_TIMEOUT = "decode_timeout"  # a picture built to be decoded for minutes
    GPU_OOM = "gpu_oom"  # does not fit into the device's memory, even alone
    CRASHED_WORKER = "crashed_worker"  # killed its worker process three times while alone
    BAD_PROMPT = "bad_prompt"  # its prompt does not fit it
    INTERNAL = "internal"  # our mistake


class AssetError(Exception):
    """A verdict on one asset. Trying again gives the same, so nobody does."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[AssetError], tuple[ErrorKind, str]]:
        # Exceptions cross process borders pickled; the default would call us with the message alone.
        return type(self), (self.kind, str(self))


class TransientError(Exception):
    """The network or the store failed after a bounded number of tries; nothing is known about the asset."""


class SourceError(Exception):
    """A folder or bucket cannot be used at all; the message says what to do about it."""


_HIDDEN = "[redacted]"
_FIELD = (
    r"(?<![a-z0-9_])[a-z0-9_-]{0,40}(?:password|passwd|pwd|passphrase|secret|secret_?access_?key|token|credential"
    r"|signature|api[_-]?key)"
)
_VALUE = rf"(?!\s*{re.escape(_HIDDEN)})(?:'[^']*'|\"[^\"]*\"|[^\s&,;'\"]+)"
_SECRETS = (
    # Authorization: Bearer x / Token x / AWS4-HMAC-SHA256 Credential=…, also as a dict's or JSON's entry
    (rf"(authorization['\"]?\s*[:=]\s*)(?!\s*{re.escape(_HIDDEN)})(?:'[^']*'|\"[^\"]*\"|[^\r\n]+)", rf"\1{_HIDDEN}"),
    (r"\b((?:bearer|token)\s+)[a-z0-9._~+/=-]{16,}", rf"\1{_HIDDEN}"),
    # scheme://user:password@host. What follows the colon is not a password when it is a port.
    (r"(\b[a-z][a-z0-9+.-]{0,30}://[^\s:/@]*):(?!\d{1,5}(?:[/?#\s]|$))[^\s]*@", rf"\1:{_HIDDEN}@"),
    # "password": "x" and 'token': 'x'
    (rf"(['\"]{_FIELD}['\"]\s*[:=]\s*){_VALUE}", rf"\1{_HIDDEN}"),
    # password=x, API_KEY=x, ?X-Amz-Signature=x&…, password='x y'
    (rf"({_FIELD}\s*=\s*){_VALUE}", rf"\1{_HIDDEN}"),
    (rf"(\b(?:password|passphrase|secret(?:[_-]?key)?)\s*:\s*){_VALUE}", rf"\1{_HIDDEN}"),
    # AWS key ids (long-lived, temporary) and JSON web tokens, wherever they stand
    (r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}", _HIDDEN),
    (r"\beyJ[a-z0-9_-]{8,}\.[a-z0-9_-]+(?:\.[a-z0-9_-]*)?", _HIDDEN),
)
_PATTERNS = tuple((re.compile(pattern, re.IGNORECASE), replacement) for pattern, replacement in _SECRETS)


def redact(text: str) -> str:
    """Remove what looks like a credential from a message that is about to be stored, logged or shown.

    Covers AWS key ids and signatures, Authorization headers, `token=` and its like, passwords in DSNs, web tokens.
    It errs on the side of removing: a harmless `token=7` goes too. Redacting twice changes nothing.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
