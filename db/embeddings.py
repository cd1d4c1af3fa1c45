"""SQL of kept embeddings: wanted, claimed, stored, failed, and which of them the sweep deletes.

An address is unique. So an embedding that two jobs or two reviewers want is made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from db.leases import ClaimedChunk
from db.states import EmbeddingState

MAX_ATTEMPTS = 3  # then the embedding fails, until somebody wants it an hour later

_RESERVING = 727_190  # the first number of an advisory lock; the second is a job's id


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddableAsset:
    """An asset with what decides its embedding. fast: its job encodes in bfloat16 (precision=fast).

    etag: of the bytes that its job read; those that were listed when it read none.
    """

    asset_id: int
    source: str
    key: str
    etag: str
    model: str
    model_version: str
    fast: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedEmbedding:
    """A row that this worker claimed. asset: None when its job was deleted since."""

    id: int
    address: str
    asset: EmbeddableAsset | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """oldest: when the stored embedding that was not used for the longest time was used last."""

    stored: int
    size_bytes: int
    oldest: datetime | None
    wanted: int
    failed: int


_ASSET = """a.id AS asset_id, j.source, a.key,
            coalesce((SELECT etag FROM outcome WHERE asset_id = a.id), a.etag) AS etag, j.model, j.model_version,
            coalesce(j.asked->'params'->>'precision' = 'fast', false) AS fast"""


def embeddable_assets(db: Connection, *, asset_ids: Sequence[int]) -> dict[int, EmbeddableAsset]:
    """What decides the embeddings of these assets, by asset. Assets of deleted jobs are left out."""
    statement = f"SELECT {_ASSET} FROM asset a JOIN job j ON j.id = a.job_id WHERE a.id = ANY(:ids)"
    rows = db.execute(text(statement), {"ids": list(asset_ids)}).mappings()
    return {row["asset_id"]: EmbeddableAsset(**row) for row in rows}


def answered_assets(db: Connection, *, chunk: ClaimedChunk) -> list[EmbeddableAsset]:
    """The assets of a chunk that were answered from an earlier job: nothing encodes them."""
    statement = text(
        f"""SELECT {_ASSET} FROM asset a JOIN job j ON j.id = a.job_id
            JOIN outcome o ON o.asset_id = a.id AND o.answered_by IS NOT NULL AND o.error_kind IS NULL
            WHERE a.job_id = :job AND a.id BETWEEN :first AND :last ORDER BY a.id"""
    )
    values = {"job": chunk.job_id, "first": chunk.first_asset_id, "last": chunk.last_asset_id}
    return [EmbeddableAsset(**row) for row in db.execute(statement, values).mappings()]


def want(db: Connection, *, addresses: Mapping[int, str]) -> dict[str, EmbeddingState]:
    """Want the embeddings at these addresses, by asset, the most urgent first. Returns each address with its state.

    A new address becomes `wanted`. A known one keeps its state and its place in the order, and counts as used now. Of
    one call, the most urgent counts as used last. So when not all fit into the budget, the least urgent are deleted.
    """
    rows = db.execute(
        text(
            """INSERT INTO embedding (address, asset_id, used_at)
               SELECT address, asset_id, now() - n * interval '1 millisecond'
               FROM unnest(CAST(:addresses AS text[]), CAST(:assets AS bigint[]))
                   WITH ORDINALITY AS asked (address, asset_id, n)
               WHERE n IN (SELECT min(n) FROM unnest(CAST(:addresses AS text[])) WITH ORDINALITY AS o (address, n)
                           GROUP BY o.address)
               ORDER BY n
               ON CONFLICT (address) DO UPDATE SET used_at = EXCLUDED.used_at, asset_id = EXCLUDED.asset_id
               RETURNING address, state"""
        ),
        {"addresses": list(addresses.values()), "assets": list(addresses)},
    )
    return {row.address: EmbeddingState(row.state) for row in rows}


def want_again(db: Connection, *, address: str) -> None:
    """Want a stored embedding anew, because its bytes are absent, damaged or another's."""
    statement = (
        f"UPDATE embedding SET {_UNMADE}, attempts = 0, wanted_at = now() WHERE address = :a AND state = 'stored'"
    )
    db.execute(text(statement), {"a": address})


_UNMADE = "state = 'wanted', error = NULL, size_bytes = 0, stored_at = NULL, claimed_until = NULL, sent_at = NULL"


def fail_abandoned(db: Connection) -> int:
    """Wanted rows whose last possible claim ran out become failed: their worker died each time. Returns how many."""
    statement = text(
        """UPDATE embedding SET state = 'failed', claimed_until = NULL,
                  error = coalesce(error || '; ', '') || 'the process that made it died'
           WHERE state = 'wanted' AND attempts >= :most AND claimed_until < now()"""
    )
    return db.execute(statement, {"most": MAX_ATTEMPTS}).rowcount


def take_unsent(db: Connection, *, most: int, resend_seconds: float, may_resend: bool) -> list[int]:
    """Mark wanted rows as sent, the oldest first, at most `most` in all. Returns their ids; publish after the commit.

    These are the rows without a message. With may_resend, also those whose message is older than resend_seconds and
    that nobody makes.
    """
    statement = text(
        """WITH fresh AS (
               SELECT count(*) AS n FROM embedding
               WHERE state = 'wanted' AND sent_at > now() - make_interval(secs => :secs)),
           taken AS (
               SELECT id FROM embedding
               WHERE state = 'wanted' AND (claimed_until IS NULL OR claimed_until < now())
                 AND (sent_at IS NULL OR (:may_resend AND sent_at < now() - make_interval(secs => :secs)))
               ORDER BY id LIMIT greatest(:most - (SELECT n FROM fresh), 0) FOR UPDATE SKIP LOCKED)
           UPDATE embedding SET sent_at = now() FROM taken WHERE embedding.id = taken.id RETURNING embedding.id"""
    )
    values = {"most": most, "secs": resend_seconds, "may_resend": may_resend}
    return sorted(db.execute(statement, values).scalars())


def unsend(db: Connection, *, ids: Sequence[int]) -> None:
    """Take back rows whose message could not be published, or whose worker stops before it makes them."""
    db.execute(
        text("UPDATE embedding SET sent_at = NULL WHERE id = ANY(:ids) AND state = 'wanted'"), {"ids": list(ids)}
    )


def claim(db: Connection, *, seconds: float, ids: Sequence[int] | None = None) -> WantedEmbedding | None:
    """Claim the next wanted row, of these ids or of all. None when there is none that nobody makes.

    Each claim is an attempt. When the worker dies, the claim runs out after `seconds`, and another worker may try.
    """
    row = (
        db.execute(
            text(
                f"""WITH next AS (
                        SELECT id FROM embedding WHERE state = 'wanted' AND attempts < :most
                          AND (claimed_until IS NULL OR claimed_until < now())
                          AND (CAST(:ids AS bigint[]) IS NULL OR id = ANY(:ids))
                        ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED),
                    claimed AS (
                        UPDATE embedding SET attempts = attempts + 1,
                               claimed_until = now() + make_interval(secs => :seconds)
                        FROM next WHERE embedding.id = next.id
                        RETURNING embedding.id, address, embedding.asset_id AS wanted_asset)
                    SELECT claimed.id, address, {_ASSET} FROM claimed
                    LEFT JOIN (asset a JOIN job j ON j.id = a.job_id) ON a.id = wanted_asset"""
            ),
            {"most": MAX_ATTEMPTS, "ids": None if ids is None else list(ids), "seconds": seconds},
        )
        .mappings()
        .one_or_none()
    )
    if row is None:
        return None
    values = dict(row)
    row_id, address = values.pop("id"), values.pop("address")
    asset = None if values["asset_id"] is None else EmbeddableAsset(**values)
    return WantedEmbedding(id=row_id, address=address, asset=asset)


def reserve(
    db: Connection,
    *,
    job_id: int,
    addresses: Mapping[int, str],
    most: int | None,
    budget_bytes: int,
    seconds: float,
) -> set[str]:
    """Reserve rows for embeddings that this worker has in memory. Returns the addresses that it may write now.

    addresses: by asset of this job. most: how many of the job's assets may have a row; None is no limit. Nothing is
    reserved when the stored embeddings fill the budget, and no address that is stored already. A reserved row is
    claimed for `seconds`. If the worker dies, the row remains as wanted. With 0 seconds the worker has nothing in
    memory: new addresses become wanted, which is no attempt, and known ones stay as they are.
    """
    db.execute(
        text("SELECT pg_advisory_xact_lock(:lock, :job)"), {"lock": _RESERVING, "job": job_id % 2**31}
    )  # two workers must not count at once
    room = db.execute(
        text(
            """SELECT CASE WHEN (SELECT coalesce(sum(size_bytes), 0) FROM embedding WHERE state = 'stored') >= :budget
                      THEN 0 ELSE :most - (SELECT count(*) FROM embedding e JOIN asset a ON a.id = e.asset_id
                                           WHERE a.job_id = :job AND CAST(:counts AS boolean)) END"""
        ),
        {"budget": budget_bytes, "job": job_id, "counts": most is not None, "most": 2**31 if most is None else most},
    ).scalar_one()
    if room <= 0:
        return set()
    allowed = dict(list(addresses.items())[:room])
    rows = db.execute(
        text(
            """INSERT INTO embedding (address, asset_id, attempts, claimed_until)
               SELECT DISTINCT ON (address) address, asset_id, CASE WHEN :seconds > 0 THEN 1 ELSE 0 END,
                      now() + make_interval(secs => :seconds)
               FROM unnest(CAST(:addresses AS text[]), CAST(:assets AS bigint[])) AS made (address, asset_id)
               ON CONFLICT (address) DO UPDATE SET state = 'wanted', used_at = now(), attempts = embedding.attempts + 1,
                   claimed_until = EXCLUDED.claimed_until WHERE embedding.state <> 'stored' AND :seconds > 0
               RETURNING address"""
        ),
        {"addresses": list(allowed.values()), "assets": list(allowed), "seconds": seconds},
    )
    return set(rows.scalars())


def record_stored(db: Connection, *, sizes: Mapping[str, int]) -> None:
    """The bytes of these addresses are written. sizes: bytes by address."""
    db.execute(
        text(
            """UPDATE embedding SET state = 'stored', error = NULL, size_bytes = written.size_bytes, stored_at = now(),
                      used_at = now(), claimed_until = NULL
               FROM unnest(CAST(:addresses AS text[]), CAST(:sizes AS bigint[])) AS written (address, size_bytes)
               WHERE embedding.address = written.address"""
        ),
        {"addresses": list(sizes), "sizes": list(sizes.values())},
    )


def record_failed(db: Connection, *, address: str, error: str, lasting: bool, retry_seconds: float) -> None:
    """An attempt failed. The row is tried again after retry_seconds.

    It becomes failed when the error is lasting, and when this was the last attempt.
    """
    db.execute(
        text(
            """UPDATE embedding SET error = :error, sent_at = NULL,
                      claimed_until = now() + make_interval(secs => :retry_seconds),
                      state = CASE WHEN :lasting OR attempts >= :most THEN 'failed' ELSE 'wanted' END
               WHERE address = :address AND state = 'wanted'"""
        ),
        {
            "address": address,
            "error": error,
            "lasting": lasting,
            "retry_seconds": retry_seconds,
            "most": MAX_ATTEMPTS,
        },
    )


def stored_of(db: Connection, *, addresses: Sequence[str]) -> set[str]:
    """Those of these addresses whose bytes are stored."""
    statement = "SELECT address FROM embedding WHERE address = ANY(:a) AND state = 'stored'"
    return set(db.execute(text(statement), {"a": list(addresses)}).scalars())


def touch(db: Connection, *, addresses: Sequence[str]) -> None:
    """These embeddings are used now."""
    db.execute(text("UPDATE embedding SET used_at = now() WHERE address = ANY(:a)"), {"a": list(addresses)})


def has_wanted(db: Connection) -> bool:
    return bool(db.execute(text("SELECT EXISTS (SELECT 1 FROM embedding WHERE state = 'wanted')")).scalar_one())


def totals(db: Connection) -> Totals:
    row = db.execute(
        text(
            """SELECT count(*) FILTER (WHERE state = 'stored') AS stored,
                      coalesce(sum(size_bytes) FILTER (WHERE state = 'stored'), 0)::bigint AS size_bytes,
                      min(used_at) FILTER (WHERE state = 'stored') AS oldest,
                      count(*) FILTER (WHERE state = 'wanted') AS wanted,
                      count(*) FILTER (WHERE state = 'failed') AS failed
               FROM embedding"""
        )
    ).mappings()
    return Totals(**row.one())
