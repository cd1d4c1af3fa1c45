"""Photos of assets for the board: small JPEGs, the newest kept in memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from db import jobs, samples
from db.session import Engine
from orchestrator.board.readings import Readings
from orchestrator.pages.gallery import PICTURED
from orchestrator.pages.page import safe_text
from orchestrator.pages.photo import CANNOT_BE_READ, photos_of, small_jpeg
from workers.errors import AssetError

_PHOTO_BYTES = 90_000
_FRESH_SECONDS = 600.0
_MOST_KEPT = 200

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Picture:
    """content_type: image/jpeg, or image/svg+xml for a sentence that says why there is no photo."""

    content: bytes
    content_type: str


class Photos:
    """Reads photos from the jobs' sources."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept = Readings(_MOST_KEPT)

    def get(self, job_id: int, asset_id: int) -> Picture | None:
        """The photo of an asset of this job that is labeled, or that failed after its photo was decoded.

        None for any other: reading it may harm. A photo that cannot be read is a picture that says so.
        """
        with self._engine.begin() as db:
            job = jobs.get_job(db, job_id=job_id)
            found = samples.photo_of(db, job_id=job_id, asset_id=asset_id)
        if job is None or found is None:
            return None
        key, error_kind = found
        if error_kind is not None and error_kind not in PICTURED:
            return None
        return self._kept.get((job.source, key), _FRESH_SECONDS, lambda: _read(job.source, key))


def _read(source: str, key: str) -> Picture:
    try:
        return Picture(small_jpeg(photos_of(source)(key), _PHOTO_BYTES), "image/jpeg")
    except CANNOT_BE_READ as error:
        log.warning("no photo of %s: %s", key, error)
        return _sentence(str(error.kind) if isinstance(error, AssetError) else "the store does not answer")


def _sentence(why: str) -> Picture:
    drawn = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 300"><rect width="400" height="300" fill="#8888" />'
        '<text x="200" y="146" text-anchor="middle" font-family="sans-serif" font-size="18" fill="#fff">'
        f'The image cannot be read</text><text x="200" y="172" text-anchor="middle" font-family="sans-serif" '
        f'font-size="15" fill="#fff">{safe_text(why)}</text></svg>'
    )
    return Picture(drawn.encode(), "image/svg+xml")
