"""The worker that runs chunks, and how it releases a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from db import jobs, leases
from db.leases import ClaimedChunk, LeaseLost
from db.session import Engine
from db.settings import Settings
from workers.detectors.detector import AskedDetector, Detector, PhraseDetector
from workers.errors import TransientError
from workers.models.spec import Model
from workers.running.outcomes import ProcessUnfit, storable_text


class Draining(Exception):
    """The worker was asked to stop. The rest of the chunk is released."""


class ModelAway(TransientError):
    """The place of the model's weights does not answer. No asset was tried."""


LoadModel = Callable[[str], Model]
LoadDetector = Callable[[AskedDetector], Detector | PhraseDetector]


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """The worker that runs chunks, with its tools. It stays the same for the life of a process."""

    name: str
    engine: Engine
    settings: Settings
    load_model: LoadModel
    load_detector: LoadDetector
    draining: Callable[[], bool]
    on_hang: Callable[[], None]


def release(
    worker: Worker,
    chunk: ClaimedChunk,
    *,
    pause: bool = False,
    error: str | None = None,
    most_failures: int | None = None,
) -> None:
    """Release the chunk, and store the error on its job. most_failures: as `release_chunk` takes it."""
    with worker.engine.begin() as db:
        leases.release_chunk(db, chunk=chunk, transient_error=pause, most_failures=most_failures)
        if error is not None:
            jobs.note_error(db, job_id=chunk.job_id, error=storable_text(f"{worker.name}: {error}"))


@contextmanager
def loading(worker: Worker, chunk: ClaimedChunk, name: str) -> Iterator[None]:
    """Turn a failed load into `unfit`. The model may load elsewhere, so this is no verdict on the job or its assets."""
    try:
        yield
    except (LeaseLost, Draining):
        raise  # about this run of the chunk, not about the model
    except TransientError as error:
        raise ModelAway(str(error)) from error
    except Exception as error:
        raise unfit(worker, chunk, name, error) from error


def unfit(worker: Worker, chunk: ClaimedChunk, name: str, error: Exception) -> ProcessUnfit:
    """Release the chunk, for a worker that has the model, and store the reason on the job."""
    release(worker, chunk, error=f"{name} cannot be loaded: {error}")
    return ProcessUnfit(f"{name} cannot be loaded: {error}")
