"""SQL of `--dedupe content`: an asset whose bytes were looked at before gets a copy of those masks.

Bytes have a key that holds the model_version too: what finds the same bytes finds the same masks. There are two kinds,
of the etag that a listing gave and of the bytes that were read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

from db.copied_outcomes import copy_outcomes, remember_bytes
from db.leases import ClaimedChunk, extend_lease
from db.states import MaskCount


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBytes:
    """What is known of an asset's bytes. etag: that was read, when it is not the one that was listed."""

    keys: Sequence[str]
    etag: str | None = None


def keys_of(content: bytes, *, model_version: str) -> tuple[str, str]:
    """The keys of bytes: by their sha256, and as an S3 listing shows them."""
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return (
        _key("sha256", hashlib.sha256(content).hexdigest(), model_version),
        _key("md5", f"{md5} {len(content)}", model_version),
    )


def key_of_etag(etag: str, size_bytes: int, *, model_version: str) -> str | None:
    """The key of an object that was uploaded in one part: then its etag is the MD5 of its bytes. Else None.

    Some encrypted objects have another etag of this form. It is the MD5 of nothing that was read, so it finds nothing.
    """
    is_md5 = len(etag) == 32 and set(etag) <= set("0123456789abcdef")
    return _key("md5", f"{etag} {size_bytes}", model_version) if is_md5 else None


def _key(kind: str, name: str, model_version: str) -> str:
    return hashlib.sha256(f"{kind} {name} {model_version}".encode()).hexdigest()[:32]


# The first labeled asset with these bytes. A job that is deleted is left out, and with `fresh` every other job.
_PAIRS = """SELECT DISTINCT ON (asked.id) asked.id, asked.etag, found.asset_id AS from_id
            FROM unnest(CAST(:ids AS bigint[]), CAST(:keys AS text[]), CAST(:etags AS text[])) AS asked (id, key, etag)
            CROSS JOIN LATERAL (
                SELECT s.asset_id FROM same_bytes s
                JOIN outcome o ON o.asset_id = s.asset_id AND o.error_kind IS NULL
                JOIN job j ON j.id = o.job_id AND j.deleted_at IS NULL
                WHERE s.key = asked.key AND s.asset_id <> asked.id
                  -- Ids of the job's own range: other jobs may have a million assets with these bytes before it.
                  AND (NOT :fresh OR (o.job_id = :job_id AND s.asset_id BETWEEN
                      (SELECT first_asset_id FROM chunk WHERE job_id = :job_id ORDER BY first_asset_id LIMIT 1) AND
                      (SELECT last_asset_id FROM chunk WHERE job_id = :job_id ORDER BY first_asset_id DESC LIMIT 1)))
                ORDER BY s.asset_id LIMIT 1) found
            ORDER BY asked.id"""


def answer_same_bytes(
    db: Connection, *, chunk: ClaimedChunk, read: Mapping[int, ReadBytes], lease_seconds: float
) -> set[int]:
    """Answer assets of the chunk with the masks of others that had the same bytes. Returns which were answered.

    read: what was read, by asset. Raises LeaseLost when this worker no longer holds the chunk.
    """
    extend_lease(db, chunk=chunk, lease_seconds=lease_seconds)
    asked = [(asset_id, key, one.etag) for asset_id, one in read.items() for key in one.keys]
    values = {
        "job_id": chunk.job_id,
        "fresh": chunk.fresh,
        "ids": [asset_id for asset_id, _, _ in asked],
        "keys": [key for _, key, _ in asked],
        "etags": [etag for _, _, etag in asked],
    }
    answered = copy_outcomes(db, _PAIRS, values, counted=MaskCount.SAME_BYTES)
    remember_bytes(db, keys=[(key, asset_id) for asset_id in answered for key in read[asset_id].keys])
    return answered


def count_same_bytes(db: Connection, *, job_id: int) -> int:
    """How many of a job's assets were answered this way."""
    statement = text(
        "SELECT coalesce(sum(number), 0)::bigint FROM mask_counter WHERE job_id = :job_id AND kind = :kind"
    )
    return int(db.execute(statement, {"job_id": job_id, "kind": MaskCount.SAME_BYTES}).scalar_one())
