"""Which objects of a source a job takes, and why others are skipped."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from db.listing import NewAsset
from workers.storage.asset import Source

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".heic", ".heif", ".hif", ".avif"),
)
SYSTEM_FILES = ("thumbs.db", "desktop.ini", ".ds_store")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One listed page after the job's filters. cursor: the last key read. complete: this was the last page."""

    assets: list[NewAsset]
    skipped: dict[str, int]
    cursor: str | None
    complete: bool


def select(source: Source, *, asked: Mapping[str, Any], after: str | None, found: int) -> Iterator[Selection]:
    """List a source page by page from a cursor, and keep what the job asked for.

    found: how many assets the job has already; its limit counts them. Keys that are left out are counted by reason.
    """
    include, exclude, limit = asked.get("include") or [], asked.get("exclude") or [], asked.get("limit")
    for page in source.list(after or ""):
        skipped = {str(reason): n for reason, n in page.skipped.items() if n}
        assets: list[NewAsset] = []
        cursor = page.cursor
        for listed in page.objects:
            reason = _why_not(listed.key, include, exclude)
            if reason:
                skipped[reason] = skipped.get(reason, 0) + 1
                continue
            assets.append(NewAsset(key=listed.key, size_bytes=listed.size_bytes, etag=listed.etag))
            if limit is not None and found + len(assets) >= limit:
                yield Selection(assets=assets, skipped=skipped, cursor=listed.key, complete=True)
                return
        found += len(assets)
        yield Selection(assets=assets, skipped=skipped, cursor=cursor, complete=False)
    yield Selection(assets=[], skipped={}, cursor=None, complete=True)


def _why_not(key: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """The reason to leave a key out, or None. `--include` replaces the rule of image suffixes."""
    name = key.rpartition("/")[2].lower()
    if name in SYSTEM_FILES or name.startswith("._"):  # macOS's `._x.jpg` holds metadata of x.jpg
        return "system_file"
    if include:
        if not any(fnmatch.fnmatchcase(key, glob) for glob in include):
            return "not_included"
    elif not key.lower().endswith(IMAGE_SUFFIXES):
        return "not_image_suffix"
    if any(fnmatch.fnmatchcase(key, glob) for glob in exclude):
        return "excluded"
    return None
