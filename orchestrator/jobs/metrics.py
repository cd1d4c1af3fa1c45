"""The deployment's numbers for Prometheus, read from Postgres and the broker when they are asked for.

Jobs that are over for an hour are left out, so the list does not grow. What is read is kept for a while: the longer a
reading took, the longer, so that a large deployment pays at most a twentieth of one connection's time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from db import metrics
from db.metrics import Sample
from db.session import DBAPIError, Engine, open_engine
from db.settings import settings
from workers.errors import redact
from workers.running.app import BrokerAway, count_waiting

_STATEMENT_SECONDS = 30.0
_FRESH_SECONDS = 5.0
_TIMES_AS_LONG = 20

log = logging.getLogger(__name__)

# Each metric: its help, its labels, and what reads it.
_READ: Mapping[str, tuple[str, Sequence[str], Callable[..., Iterable[Sample]]]] = {
    "maskfleet_jobs": ("Jobs by state", ["state"], metrics.jobs_by_state),
    "maskfleet_assets": ("Assets of a job by state", ["job", "state"], metrics.assets_by_state),
    "maskfleet_failed_assets": ("Failed assets of a job by kind", ["job", "kind"], metrics.failed_by_kind),
    "maskfleet_masks": ("Masks of a job", ["job"], metrics.masks),
    "maskfleet_chunks": ("Open chunks by state", ["state"], metrics.chunks_by_state),
    "maskfleet_oldest_chunk_seconds": (
        "Since the oldest queued chunk was sent, and since the oldest running chunk was claimed",
        ["state"],
        metrics.oldest_chunks,
    ),
    "maskfleet_lease_overdue_seconds": (
        "Since the oldest lease expired; below 0: until the next one expires",
        [],
        metrics.lease_overdue,
    ),
    "maskfleet_listing_failing_seconds": (
        "Since the listing of a job began to fail",
        ["job"],
        metrics.listing_failing,
    ),
    "maskfleet_processes": ("Live processes by kind", ["kind"], metrics.live_processes),
    "maskfleet_failed_starts": ("Failed starts of a worker in a row", ["worker"], metrics.failed_starts),
    "maskfleet_unpublished_assets": (
        "Labeled assets of a published job that its project does not have yet",
        ["job", "project"],
        metrics.unpublished,
    ),
    "maskfleet_predictions": ("Predictions of a job by state", ["job", "project", "state"], metrics.predictions),
    "maskfleet_review_age_seconds": ("Since a project's annotations were read", ["project"], metrics.review_ages),
    "maskfleet_embeddings": ("Kept embeddings by state", ["state"], metrics.embeddings),
    "maskfleet_embedding_bytes": ("Bytes of kept embeddings by state", ["state"], metrics.embedding_bytes),
}


def serve_metrics(address: str, port: int, *, database_url: str) -> None:
    """Answer Prometheus on address:port from a thread of its own. Raises OSError when the port is taken."""
    registry = CollectorRegistry()
    registry.register(DeploymentCollector(open_engine(database_url, statement_timeout_seconds=_STATEMENT_SECONDS)))
    start_http_server(port, addr=address, registry=registry)


class DeploymentCollector(Collector):
    """Reads the deployment's numbers. While Postgres is away, maskfleet_up is 0 and the others are missing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._known: list[Metric] = []
        self._fresh_until = 0.0

    def describe(self) -> Iterable[Metric]:
        return []  # without this, registering would read everything

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            if time.monotonic() >= self._fresh_until:
                started = time.monotonic()
                self._known = self._read()
                took = time.monotonic() - started
                self._fresh_until = started + max(_FRESH_SECONDS, _TIMES_AS_LONG * took)
            return self._known

    def _read(self) -> list[Metric]:
        found = [_gauge("maskfleet_window_chunks", "Most chunks in the queue", [], [((), settings().window_chunks)])]
        try:
            with self._engine.begin() as db:
                db_found = [_gauge(name, text, labels, read(db)) for name, (text, labels, read) in _READ.items()]
        except DBAPIError as error:
            log.warning("no metrics: %s", redact(" ".join(str(error.orig).split())))
            return [*found, _gauge("maskfleet_up", "Whether Postgres answers", [], [((), 0)])]
        return [*found, *db_found, *_queue(), _gauge("maskfleet_up", "Whether Postgres answers", [], [((), 1)])]


def _queue() -> list[Metric]:
    """How many messages wait. Nothing while the broker is away."""
    try:
        return [_gauge("maskfleet_queue_messages", "Messages that wait in the broker", [], [((), count_waiting())])]
    except BrokerAway:
        return []


def _gauge(name: str, text: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=labels)
    for values, number in samples:
        gauge.add_metric(list(values), number)
    return gauge
