"""Makes an asset's outcome, from the found masks or from the error."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from db.leases import Asset, NewOutcome
from db.texts import storable
from workers.errors import AssetError, ErrorKind, redact
from workers.images.pixels import RgbImage
from workers.masks import Mask
from workers.models.loading import count_loaded
from workers.stored_masks import stored_mask

_SHOWN_REASONS = 5

log = logging.getLogger(__name__)


class ProcessUnfit(RuntimeError):
    """This process can label nothing: its CUDA context is broken, or its model cannot be loaded.

    It must end without a verdict on any asset, because other processes may work.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An asset's masks. unused: which of its prompts could not be used, and why."""

    masks: Sequence[Mask]
    unused: str | None = None


def judge(error: Exception) -> tuple[ErrorKind, str]:
    """The verdict on an asset that raised this error. Raises ProcessUnfit when the process is broken, not the asset."""
    if isinstance(error, AssetError):
        return error.kind, str(error)
    from workers.engine.device import DeviceFault, device_fault

    match device_fault(error):
        case DeviceFault.LOST:
            raise ProcessUnfit(str(error)) from error
        case DeviceFault.OUT_OF_MEMORY:
            return ErrorKind.GPU_OOM, f"does not fit in device memory, even alone: {error}"
    return ErrorKind.INTERNAL, f"{type(error).__name__}: {error}"


def failed_outcome(asset: Asset, error: Exception, *, job_id: int) -> NewOutcome:
    """The outcome of an asset that raised this error. Internal errors are logged.

    Raises ProcessUnfit like `judge`, and for an asset that may fit into a new process, where no other job's model is.
    """
    kind, text = judge(error)
    if kind is ErrorKind.GPU_OOM and count_loaded() > 1:
        raise ProcessUnfit(f"asset {asset.id} does not fit beside the models of other jobs: {text}") from error
    if kind is ErrorKind.INTERNAL:
        about = {"asset": asset.id, "job": job_id}
        log.error("asset %d of job %d: %s", asset.id, job_id, redact(text), exc_info=error, extra=about)
    return NewOutcome(asset_id=asset.id, error_kind=kind, error=storable_text(text))


def storable_text(text: str) -> str:
    """A message without secrets, with the characters that Postgres refuses escaped, at most 2,000 characters."""
    return storable(redact(text))[:2000]


def list_unused(wrong: Sequence[str], asked: int | None, what: str) -> str:
    """One line for the asset's row. It gives the first _SHOWN_REASONS reasons and counts the rest."""
    of = "" if asked is None else f" of {asked}"
    more = f"; and {len(wrong) - _SHOWN_REASONS} more" if len(wrong) > _SHOWN_REASONS else ""
    return f"{len(wrong)}{of} {what} cannot be used: {'; '.join(wrong[:_SHOWN_REASONS])}{more}"


def labeled_outcome(asset: Asset, image: RgbImage, found: Found, started: float, label: str | None) -> NewOutcome:
    height, width = image.shape[:2]
    return NewOutcome(
        asset_id=asset.id,
        error=None if found.unused is None else storable_text(found.unused),
        width=width,
        height=height,
        segment_ms=int(1000 * (time.perf_counter() - started)),
        masks=[stored_mask(asset, n, mask, label) for n, mask in enumerate(found.masks)],
    )
