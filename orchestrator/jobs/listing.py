"""Which objects of a source a job takes, and why others are skipped."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from db.jobs import Job
from db.listing import NewAsset
from orchestrator.jobs.key_lists import KeyList
from workers.storage.asset import Page, SkipReason, Source

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".heic", ".heif", ".hif", ".avif"),
)
_MOST_WALKS = 8  # each may hold the names of a folder
SYSTEM_FILES = ("thumbs.db", "desktop.ini", ".ds_store")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One listed page after the job's filters. cursor: the last key read. complete: this was the last page."""

    assets: list[NewAsset]
    skipped: dict[str, int]
    cursor: str | None
    complete: bool


class Listable(Protocol):
    """A source, or a part of one."""

    def list(self, after: str = "") -> Iterator[Page]: ...


def listed_part(source: Source, asked: Mapping[str, Any]) -> Listable:
    """What is listed of a source: all of it, or what a list of keys names."""
    return KeyList(source, asked["keys"]) if asked.get("keys") else source


def select(
    source: Listable, *, asked: Mapping[str, Any], after: str | None, found: int, known: Collection[str] = ()
) -> Iterator[Selection]:
    """List a source page by page from a cursor, and keep what the job asked for.

    found: how many assets the job has already; its limit counts them. known: their keys, for a list of keys with a
    limit, which counts each key once. Keys that are left out are counted by reason.
    """
    include, exclude, limit = asked.get("include") or [], asked.get("exclude") or [], asked.get("limit")
    seen = set(known)  # with a list of keys and a limit: at most as many as the limit
    for page in source.list(after or ""):
        skipped = {str(reason): n for reason, n in page.skipped.items() if n}
        assets: list[NewAsset] = []
        cursor = page.cursor
        for listed in page.objects:
            reason = _why_not(listed.key, include, exclude)
            if reason:
                skipped[reason] = skipped.get(reason, 0) + 1
                continue
            if limit is not None and asked.get("keys"):
                if listed.key in seen:
                    skipped[SkipReason.DUPLICATE_KEY] = skipped.get(SkipReason.DUPLICATE_KEY, 0) + 1
                    continue
                seen.add(listed.key)
            assets.append(NewAsset(key=listed.key, size_bytes=listed.size_bytes, etag=listed.etag))
            if limit is not None and found + len(assets) >= limit:
                yield Selection(assets=assets, skipped=skipped, cursor=listed.key, complete=True)
                return
        found += len(assets)
        yield Selection(assets=assets, skipped=skipped, cursor=cursor, complete=False)
    yield Selection(assets=[], skipped={}, cursor=None, complete=True)


class Walks:
    """Listings that go on in the next round, by job. A folder of a million files is then read once, not in each round.

    A walk is only used while its job is where the walk is. After a restart, or beside another dispatcher, a new walk
    begins behind the job's cursor.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[tuple[str | None, int], Iterator[Selection]]] = {}

    def take(self, job: Job, source: Listable, known: Callable[[], Collection[str]] = set) -> Iterator[Selection]:
        """The pages behind the job's cursor. known: asked where a new walk begins, as in `select`."""
        place, pages = self._kept.pop(job.id, (None, None))
        if pages is not None and place == (job.list_cursor, job.asset_count):
            return pages
        return select(source, asked=job.asked, after=job.list_cursor, found=job.asset_count, known=known())

    def keep_only(self, job_ids: Collection[int]) -> None:
        """Forget the walks of all other jobs."""
        self._kept = {job_id: kept for job_id, kept in self._kept.items() if job_id in job_ids}

    def keep(self, job: Job, pages: Iterator[Selection]) -> None:
        """Keep the pages behind those that are stored on the job's row."""
        self._kept[job.id] = (job.list_cursor, job.asset_count), pages
        if len(self._kept) > _MOST_WALKS:
            del self._kept[next(iter(self._kept))]


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
