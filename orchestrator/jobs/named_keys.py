"""What the readers of key lists have in common: one entry of a list, and where it ends."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

from db.texts import is_storable
from workers.storage.asset import SkipReason

MOST_KEY_BYTES = 4096  # S3's keys have 1,024 at most, paths 4,096


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedKey:
    """One entry of a list. position: where reading goes on behind it. key: relative to the source, or why it is none.

    size_bytes, etag: None where the list does not say them.
    """

    position: int
    key: str | SkipReason
    size_bytes: int | None = None
    etag: str | None = None


def checked_key(key: object, prefix: str) -> str | SkipReason:
    """A key without its prefix, which all keys of the source have in this list."""
    if not isinstance(key, str) or not is_storable(key) or len(key.encode()) > MOST_KEY_BYTES + len(prefix):
        return SkipReason.NOT_A_KEY
    if not key.startswith(prefix):
        return SkipReason.OUTSIDE_SOURCE
    return key.removeprefix(prefix) or SkipReason.NOT_A_KEY


def own_key(key: object, uri: str) -> str | SkipReason:
    """A key of a list that people made: relative to the source at `uri`, or an address in the source.

    A file's address is a path, as `find` prints it, or a URL as exports write it.
    """
    if not isinstance(key, str):
        return SkipReason.NOT_A_KEY
    is_folder = uri.startswith("file://")
    if key.startswith(uri):
        key = unquote(key.removeprefix(uri)) if is_folder else key.removeprefix(uri)
    elif key.startswith(("s3://", "file://")):
        return SkipReason.OUTSIDE_SOURCE
    elif is_folder:
        key = key.removeprefix(unquote(uri.removeprefix("file://"))).removeprefix("./")
    return checked_key(key, "")


def checked_etag(etag: object) -> str | None:
    """An etag without its quotes. None for what is none, or what Postgres cannot store."""
    return etag.strip('"') or None if isinstance(etag, str) and is_storable(etag) and len(etag) < 200 else None
