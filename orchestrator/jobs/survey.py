"""What a request would find: its assets, and which of them its prompts mean. Nothing is stored."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from db.settings import settings
from orchestrator.jobs.listing import listed_part, select
from orchestrator.jobs.request import Request
from orchestrator.prompts.key_matching import match
from workers.storage.source import open_source

_SAMPLE = 10


@dataclass(slots=True, kw_only=True)
class Survey:
    """What was listed. complete: the whole source was listed. matched: as on a job's row; None without prompts, or if
    the listing is not complete."""

    assets: int = 0
    size_bytes: int = 0
    sample: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    complete: bool = False
    matched: dict[str, Any] | None = None


def survey(
    request: Request, *, seconds: float | None = None, progress: Callable[[int], None] = lambda _: None
) -> Survey:
    """List a request's source with its filters, for about so long if a time is given, and match its prompts.

    progress: called with how many assets were found so far. Raises what listing a source raises.
    """
    found = Survey()
    give_way_at = None if seconds is None else time.monotonic() + seconds
    keys = _keys(request, found, give_way_at, progress)
    if request.prompts is None:
        for _ in keys:
            pass
        return found
    with match((key for key, _ in request.prompts.rows()), enumerate(keys), source=request.source) as matching:
        found.matched = matching.report().as_json() if found.complete else None
    return found


def _keys(request: Request, found: Survey, give_way_at: float | None, progress: Callable[[int], None]) -> Iterator[str]:
    """The keys of the request's assets, counted as they pass."""
    source = open_source(request.source, s3_endpoint=settings().s3_endpoint)
    progress(0)
    for page in select(listed_part(source, request.asked()), asked=request.asked(), after=None, found=0):
        found.assets += len(page.assets)
        found.size_bytes += sum(asset.size_bytes for asset in page.assets)
        found.sample += [asset.key for asset in page.assets[: _SAMPLE - len(found.sample)]]
        found.skipped.update(page.skipped)
        found.complete = page.complete
        progress(found.assets)
        yield from (asset.key for asset in page.assets)
        if give_way_at is not None and time.monotonic() > give_way_at:
            return
