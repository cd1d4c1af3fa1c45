"""Assets are read and decoded ahead of the model, in threads, and a decode has a time limit.

The limit is on computing time, so that a busy or frozen machine gives no verdict. A thread inside a decoder of C cannot
be stopped. So an asset that takes too long gets its verdict, and the process ends after its batch: only that frees the
thread. Nothing is paid for this by pictures that decode in time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from db.leases import Asset, NewOutcome
from db.settings import Settings
from workers.errors import AssetError, ErrorKind
from workers.images.decode import decode
from workers.images.pixels import RgbImage
from workers.running.metrics import timed
from workers.storage.asset import Source

BytesKeys = tuple[str, str]  # of `db.same_bytes`

_THREADS = 4
_LOOK_SECONDS = 0.5  # between looks at a decode that goes on
_WAITS = 10  # decoders with threads of their own, or that wait, may take so many times the limit on the wall's clock


class DecodeStuck(Exception):
    """A decode did not end in time, and its thread cannot be stopped. The process must end."""


class NotFetched(Exception):
    """No thread is free for this asset, because decodes that do not end hold them all. Nothing is known about it."""


@dataclass(frozen=True, slots=True)
class _Decode:
    """A decode that goes on: when it began, and the clock of its thread's computing time (None: not on this system)."""

    began_at: float
    cpu_clock: int | None
    cpu_began_at: float

    @classmethod
    def begin(cls) -> _Decode:
        """A decode that begins now in this thread."""
        clock_of = getattr(time, "pthread_getcpuclockid", None)
        clock = None if clock_of is None else clock_of(threading.get_ident())
        return cls(time.monotonic(), clock, 0.0 if clock is None else time.clock_gettime(clock))

    def takes_longer_than(self, seconds: float) -> bool:
        passed = time.monotonic() - self.began_at
        if self.cpu_clock is None:
            return passed > seconds
        try:
            computed = time.clock_gettime(self.cpu_clock) - self.cpu_began_at
        except OSError:  # its thread has just ended
            return False
        return computed > seconds or passed > _WAITS * seconds


class FetchAhead:
    """Reads and decodes the assets of one source. Use it in a `with` block, which may end with DecodeStuck.

    is_stuck: a decode did not end in time. Every outcome of the batch is to be stored, and then the block to be left.
    """

    def __init__(
        self, source: Source, settings: Settings, worker: str, keys_of: Callable[[bytes], BytesKeys] | None = None
    ) -> None:
        """keys_of: called with the bytes of each asset, None: not needed."""
        self._source = source
        self._keys_of = keys_of
        self._bytes_keys: dict[int, BytesKeys] = {}
        self._settings = settings
        self._worker = worker
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")
        self._images: dict[int, Future[RgbImage]] = {}
        self._started: set[int] = set()
        self._decodes: dict[int, _Decode] = {}
        self._etags: dict[int, str] = {}
        self._running: list[Future[RgbImage]] = []
        self.is_stuck = False

    def __enter__(self) -> FetchAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        # Not `wait(...).not_done`: for it a future that was cancelled before its start is never done.
        while not self.is_stuck and (running := [future for future in self._running if not future.done()]):
            wait(running, timeout=_LOOK_SECONDS)
            self.is_stuck = self._count_overdue() > 0
        if self.is_stuck:
            raise DecodeStuck

    def start(self, asset: Asset) -> None:
        """Begin to read an asset, unless that was begun before."""
        if asset.id in self._started:
            return
        self._started.add(asset.id)
        self._images[asset.id] = self._threads.submit(self._fetch, asset)
        self._running = [future for future in self._running if not future.done()] + [self._images[asset.id]]

    def image(self, asset: Asset) -> RgbImage:
        """The picture of an asset that was started. Waits for it while its decode computes for at most decode_seconds.

        Raises what reading and decoding raise, AssetError(decode_timeout), NotFetched.
        """
        future = self._images.pop(asset.id)
        while True:
            try:
                return future.result(timeout=_LOOK_SECONDS)
            except TimeoutError:
                if future.done():
                    return future.result()
            if self._is_overdue(asset.id):
                self.is_stuck = True
                limit = self._settings.decode_seconds
                message = f"{asset.key}: {asset.size_bytes:,} bytes, not decoded within {limit:g} s; save it as PNG"
                raise AssetError(ErrorKind.DECODE_TIMEOUT, message)
            if asset.id not in self._decodes and self._count_overdue() >= _THREADS:
                self.is_stuck = True
                raise NotFetched(asset.key)

    def with_etag(self, outcome: NewOutcome) -> NewOutcome:
        """The outcome, with the etag of the asset's bytes when they were not those that were listed."""
        etag = self._etags.get(outcome.asset_id)
        return outcome if etag is None else replace(outcome, etag=etag)

    def changed_etag(self, asset: Asset) -> str | None:
        """The etag of the asset's bytes when they were not those that were listed."""
        return self._etags.get(asset.id)

    def bytes_keys(self, asset: Asset) -> BytesKeys:
        """What `keys_of` gave for the asset, whose image was returned."""
        return self._bytes_keys.pop(asset.id)

    def as_read(self, asset: Asset) -> Asset:
        """The asset, with the etag of the bytes that were read."""
        return replace(asset, etag=self._etags.get(asset.id, asset.etag))

    def _fetch(self, asset: Asset) -> RgbImage:
        with timed(self._worker, "fetch"):
            read = self._source.read_with_etag(asset.key, self._settings.max_object_bytes)
        if read.etag and read.etag != asset.etag:
            self._etags[asset.id] = read.etag
        if self._keys_of is not None:
            self._bytes_keys[asset.id] = self._keys_of(read.content)
        self._decodes[asset.id] = _Decode.begin()
        try:
            with timed(self._worker, "decode"):
                return decode(read.content, name=asset.key, max_pixels=self._settings.max_pixels)
        finally:
            del self._decodes[asset.id]

    def _is_overdue(self, asset_id: int) -> bool:
        decode_of = self._decodes.get(asset_id)
        return decode_of is not None and decode_of.takes_longer_than(self._settings.decode_seconds)

    def _count_overdue(self) -> int:
        return sum(self._is_overdue(asset_id) for asset_id in tuple(self._decodes))
