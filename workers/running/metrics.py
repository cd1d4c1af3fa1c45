"""What a worker counts and times, for Prometheus. The one door to prometheus-client beside the dispatcher's.

The pool's children count, and the supervisor answers scrapes. When it was given a port, it names a folder in
PROMETHEUS_MULTIPROC_DIR: prometheus-client then keeps each process's numbers in a file there, which outlives it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # the name is prometheus-client's
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_steps = Histogram(
    "maskfleet_step_seconds",
    "Seconds of one step: fetch and decode of an asset, encode of a batch, masks of an asset, store of a batch",
    ["worker", "step"],
    buckets=_SECONDS,
)
_assets = Counter("maskfleet_worker_assets", "Assets with an outcome that this worker stored", ["worker", "outcome"])
_masks = Counter("maskfleet_worker_masks", "Masks that this worker stored", ["worker"])


@contextmanager
def timed(worker: str, step: str) -> Iterator[None]:
    """Time one step of a worker: fetch, decode, encode, masks or store. The model works in encode and masks."""
    started = time.perf_counter()
    try:
        yield
    finally:
        _step(worker, step).observe(time.perf_counter() - started)


@cache
def _step(worker: str, step: str) -> Histogram:
    return _steps.labels(worker, step)


def count_stored(worker: str, *, labeled: int, failed: int, masks: int) -> None:
    _assets.labels(worker, "labeled").inc(labeled)
    _assets.labels(worker, "failed").inc(failed)
    _masks.labels(worker).inc(masks)


class _Starts(Collector):
    """Failed starts in a row, by worker. read: gives the numbers now."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        starts = GaugeMetricFamily("maskfleet_worker_failed_starts", "Failed starts in a row", labels=["worker"])
        for worker, count in self._read().items():
            starts.add_metric([worker], count)
        yield starts


def serve_worker_metrics(
    address: str, port: int, *, folder: Path, failed_starts: Callable[[], Mapping[str, int]]
) -> None:
    """Answer Prometheus on address:port from a thread of its own. Raises OSError when the port is taken.

    folder: where the children keep their numbers. failed_starts: by worker; called at each scrape.
    """
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]  # the library has no types there
    registry.register(_Starts(failed_starts))
    start_http_server(port, addr=address, registry=registry)
