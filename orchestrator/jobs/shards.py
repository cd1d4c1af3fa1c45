"""Lists a bucket in ranges of keys, several at once. A range that is long is split where the store has keys.

Nobody knows beforehand how the keys are spread. So a listing begins with one range, and whenever fewer ranges are open
than may be, one of them is split in the middle of its key space.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from db import list_shards
from db.jobs import Job
from db.list_shards import ListShard
from db.session import Engine
from db.settings import settings
from db.states import JobState
from orchestrator.jobs.listing import Selection, select
from workers.storage.asset import PAGE_SIZE, Page, Source

if TYPE_CHECKING:
    from workers.storage.bucket import Bucket

_PROBES = 8  # list requests of one try to split
_LAST_ASCII, _LAST_CHARACTER = 0x7F, 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)


def list_in_parallel(engine: Engine, job: Job, source: Source, *, seconds: float) -> bool:
    """Store the next pages of a job's ranges. False for a folder, which has none.

    Raises SourceError and TransientError.
    """
    from workers.storage.bucket import Bucket  # here, because it loads boto3

    if not isinstance(source, Bucket):
        return False
    _ParallelListing(engine, job, source, most=job.asked["list_shards"]).go_on(seconds)
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """The part of a bucket with the keys up to `upto`."""

    bucket: Bucket
    upto: str | None

    def list(self, after: str = "") -> Iterator[Page]:
        return self.bucket.list(after, upto=self.upto)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """Where a range may be split. upto: nothing is behind this key. at: None if no place was found. high: where the
    next try goes on; None if the range is too short."""

    upto: str | None
    at: str | None
    high: str | None


class _ParallelListing:
    """shards: the open ranges. long: those that are known to have more than a page. high: of `_Cut`."""

    def __init__(self, engine: Engine, job: Job, bucket: Bucket, *, most: int) -> None:
        self._engine, self._job, self._bucket, self._most = engine, job, bucket, most
        self._shards: dict[int, ListShard] = {}
        self._pages: dict[int, Iterator[Selection]] = {}
        self._long: set[int] = set()
        self._high: dict[int, str | None] = {}
        self._tries: Counter[int] = Counter()
        self._fetching: dict[Future[Selection], int] = {}
        self._cutting: dict[Future[_Cut], int] = {}

    def go_on(self, seconds: float) -> None:
        give_way_at = time.monotonic() + seconds
        with self._engine.begin() as db:
            self._shards = {shard.n: shard for shard in list_shards.open_shards(db, job_id=self._job.id)}
        with ThreadPoolExecutor(self._most, thread_name_prefix="list") as pool:
            for n in self._shards:
                self._fetch(pool, n)
            while self._fetching:
                working: list[Future[Any]] = [*self._fetching, *self._cutting]
                done, _ = wait(working, return_when=FIRST_COMPLETED)
                is_time = time.monotonic() < give_way_at
                for future in done:
                    if future in self._cutting:
                        self._cut(pool, self._cutting.pop(future), future.result(), is_time=is_time)
                    elif not self._take_page(self._fetching.pop(future), future.result()):
                        return
                for n in self._shards.keys() - self._fetching.values() if is_time else ():
                    self._fetch(pool, n)
                if is_time:
                    self._look_for_cuts(pool)

    def _fetch(self, pool: ThreadPoolExecutor, n: int) -> None:
        shard = self._shards[n]
        if n not in self._pages:
            part = _Range(bucket=self._bucket, upto=shard.upto)
            self._pages[n] = select(part, asked=self._job.asked, after=shard.cursor, found=0)
        self._fetching[pool.submit(next, self._pages[n])] = n

    def _take_page(self, n: int, page: Selection) -> bool:
        """Store a page. False when the listing is over, or is another's."""
        shard = self._shards[n]
        cursor = shard.cursor if page.cursor is None else page.cursor
        if shard.upto is not None and cursor > shard.upto:  # the range was split while this page was fetched
            del self._pages[n]
            return True
        with self._engine.begin() as db:
            stored = list_shards.add_shard_page(
                db,
                job=self._job,
                shard=shard,
                assets=page.assets,
                cursor=cursor,
                skipped=page.skipped,
                is_done=page.complete,
                chunk_size=settings().chunk_size,
            )
        if stored is None or stored.state is not JobState.LISTING:
            return False
        if page.complete:
            del self._shards[n], self._pages[n]
            self._long.discard(n)
        else:
            self._shards[n] = ListShard(n=n, cursor=cursor, upto=shard.upto)
            if len(page.assets) + sum(page.skipped.values()) >= PAGE_SIZE:
                self._long.add(n)
        return True

    def _look_for_cuts(self, pool: ThreadPoolExecutor) -> None:
        """While fewer ranges are open than may be: look where a long one can be split."""
        candidates = [n for n in self._long if n not in self._cutting.values() and self._high.get(n, "") is not None]
        room = self._most - len(self._shards) - len(self._cutting)
        for n in sorted(candidates, key=lambda n: (self._tries[n], n))[: max(room, 0)]:
            self._tries[n] += 1
            high = self._high.get(n) or self._shards[n].upto
            self._cutting[pool.submit(find_cut, self._bucket, self._shards[n], high)] = n

    def _cut(self, pool: ThreadPoolExecutor, n: int, cut: _Cut, *, is_time: bool) -> None:
        self._high[n] = cut.high
        shard = self._shards.get(n)
        if shard is None or not is_time:
            return
        with self._engine.begin() as db:
            if cut.upto is not None and cut.upto > shard.cursor:
                shard = list_shards.shorten_shard(db, job=self._job, shard=shard, upto=cut.upto) or shard
            halves = None
            if cut.at is not None and cut.at > shard.cursor:
                halves = list_shards.split_shard(db, job=self._job, shard=shard, at=cut.at)
        self._shards[n] = shard
        if halves is None:
            return
        left, right = halves
        self._shards[n], self._shards[right.n] = left, right
        if n not in self._fetching.values():
            self._pages.pop(n, None)
        self._long.add(right.n)
        self._high[n] = left.upto
        self._fetch(pool, right.n)


def find_cut(bucket: Bucket, shard: ListShard, high: str | None) -> _Cut:
    """Look for a place in a range with more than a page of keys behind it. high: only before this key."""
    upto: str | None = None
    if high is None:
        upto = high = _shared_end(bucket, shard.cursor)
    for _ in range(_PROBES):
        at = middle(shard.cursor, high)
        if at is None:
            return _Cut(upto=upto, at=None, high=None)
        page = next(bucket.list(at, upto=shard.upto), None)
        if page is None:
            upto = at
        elif len(page.objects) + sum(page.skipped.values()) >= PAGE_SIZE:
            return _Cut(upto=upto, at=at, high=high)
        high = at
    return _Cut(upto=upto, at=None, high=high)


def _shared_end(bucket: Bucket, cursor: str) -> str | None:
    """A key behind all keys, which begin as the cursor does for as long as possible. None when they share nothing.

    Keys behind the first letters of the cursor and the last sign of ASCII begin otherwise. With more letters, there are
    more of them. So a few list requests find the first letter in which keys differ.
    """
    fewest, most = 0, len(cursor)
    while fewest < most:
        letters = (fewest + most) // 2
        if next(bucket.list(cursor[:letters] + chr(_LAST_ASCII)), None) is None:
            fewest = letters + 1
        else:
            most = letters
    return cursor[: fewest - 1] + chr(_LAST_ASCII) if fewest else None


def middle(low: str, high: str | None) -> str | None:
    """A short key between two keys, about half-way in the order of S3. high: None is behind all usual keys.

    None when there is none of use, and when `high` is not behind `low`, because the listing has passed it meanwhile.
    """
    if high is not None and high <= low:
        return None
    shared = 0 if high is None else len(commonprefix([low, high]))  # noqa: RUF071  keys, not paths
    behind = ord(high[shared]) if high is not None and shared < len(high) else None
    if high is not None and behind is None:
        return None
    for place in range(shared, len(low) + 1):
        before = ord(low[place]) if place < len(low) else ord(" ") - 1
        behind = behind or (_LAST_ASCII if before < _LAST_ASCII else _LAST_CHARACTER)
        if behind - before > 1:
            code = (before + behind) // 2
            return low[:place] + chr(_SURROGATES.start - 1 if code in _SURROGATES else code)
        behind = None
    return None
