"""Prompts of a job: stores them by key, joins them with the assets they mean, and counts the unused ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from sqlalchemy import Connection, text

from db import counters
from db.copying import COPY_ROWS, copy_rows
from db.leases import ClaimedChunk
from db.states import MaskCount


def store_prompts(db: Connection, *, job_id: int, rows: Iterable[tuple[str, str]]) -> None:
    """Store a job's prompts: (key, JSON list of prompts). There may be any number; they are streamed.

    Rows of one key are joined in their order.
    """
    db.execute(text("SET LOCAL statement_timeout = 0"))  # a million rows take longer than any other statement may
    db.execute(
        text(
            """CREATE TEMPORARY TABLE new_prompt (n bigint GENERATED ALWAYS AS IDENTITY, key text COLLATE "C",
                                                  prompts jsonb) ON COMMIT DROP"""
        )
    )
    remaining = iter(rows)
    while batch := list(islice(remaining, COPY_ROWS)):
        copy_rows(db, "new_prompt (key, prompts)", iter(batch))
    db.execute(
        text(
            """INSERT INTO prompt (job_id, key, prompts)
               SELECT :job_id, key, jsonb_path_query_array(jsonb_agg(prompts ORDER BY n), '$[*][*]')
               FROM new_prompt GROUP BY key"""
        ),
        {"job_id": job_id},
    )


def prompt_keys(db: Connection, *, job_id: int, after: str | None, limit: int) -> list[str]:
    """The keys of a job's prompts after a key, in binary order."""
    statement = text(
        """SELECT key FROM prompt WHERE job_id = :job_id AND (CAST(:after AS text) IS NULL OR key > :after)
           ORDER BY key LIMIT :limit"""
    )
    return list(db.execute(statement, {"job_id": job_id, "after": after, "limit": limit}).scalars())


def asset_keys(db: Connection, *, job_id: int, after: str | None, limit: int) -> list[tuple[int, str]]:
    """(id, key) of a job's assets after a key, in binary order."""
    statement = text(
        """SELECT id, key FROM asset WHERE job_id = :job_id AND (CAST(:after AS text) IS NULL OR key > :after)
           ORDER BY key LIMIT :limit"""
    )
    rows = db.execute(statement, {"job_id": job_id, "after": after, "limit": limit})
    return [(row.id, row.key) for row in rows]


def store_matches(db: Connection, *, job_id: int, pairs: Iterable[tuple[int, str]], matched: Mapping[str, Any]) -> bool:
    """Store which assets a job's prompts mean, as any number of (asset id, key), and the report about the matching.

    False, and nothing is stored, if another dispatcher was first, or if the job's deletion has begun: some of the
    assets may be gone. While the job's row is locked, no deletion begins.
    """
    statement = text(
        """UPDATE job SET matched = CAST(:matched AS jsonb)
           WHERE id = :job_id AND matched IS NULL AND deleted_at IS NULL"""
    )
    if db.execute(statement, {"job_id": job_id, "matched": json.dumps(dict(matched))}).rowcount != 1:
        return False
    remaining = iter(pairs)
    while batch := list(islice(remaining, COPY_ROWS)):
        copy_rows(db, "prompt_match (asset_id, key)", iter(batch))
    return True


def prompted_assets(db: Connection, *, chunk: ClaimedChunk) -> set[int]:
    """The assets of a chunk for which the job has prompts."""
    statement = text(
        """WITH asked AS (
               SELECT id, key FROM asset WHERE job_id = :job_id AND id BETWEEN :first AND :last
               UNION ALL SELECT asset_id, key FROM prompt_match WHERE asset_id BETWEEN :first AND :last)
           SELECT DISTINCT asked.id FROM asked JOIN prompt p ON p.job_id = :job_id AND p.key = asked.key
           WHERE p.prompts <> '[]'"""
    )
    values = {"job_id": chunk.job_id, "first": chunk.first_asset_id, "last": chunk.last_asset_id}
    return set(db.execute(statement, values).scalars())


def prompts_of(db: Connection, *, asset_id: int) -> list[Any]:
    """The prompts of an asset in its job. Each is a prompt's JSON or {"error": why it cannot be used}."""
    statement = text(
        """WITH asked AS (
               SELECT job_id, key FROM asset WHERE id = :asset_id
               UNION SELECT a.job_id, m.key FROM prompt_match m JOIN asset a ON a.id = m.asset_id
               WHERE m.asset_id = :asset_id)
           SELECT p.prompts FROM asked JOIN prompt p USING (job_id, key) ORDER BY p.key"""
    )
    return [prompt for row in db.execute(statement, {"asset_id": asset_id}) for prompt in row.prompts]


def assets_with_unused_prompts(db: Connection, *, job_id: int, limit: int) -> tuple[int, list[tuple[str, str]]]:
    """Labeled assets with prompts that could not be used: their number, and the first listed ones as (key, why)."""
    number = text("SELECT coalesce(sum(unused), 0)::bigint FROM outcome_counter WHERE job_id = :job_id")
    statement = text(
        """SELECT a.key, o.error FROM outcome o JOIN asset a ON a.id = o.asset_id
           WHERE o.job_id = :job_id AND o.error_kind IS NULL AND o.error IS NOT NULL ORDER BY o.asset_id LIMIT :limit"""
    )
    rows = db.execute(statement, {"job_id": job_id, "limit": limit}).all()
    return int(db.execute(number, {"job_id": job_id}).scalar_one()), [(row.key, row.error) for row in rows]


def classes_of(db: Connection, *, job_id: int) -> dict[str, int]:
    """How many masks a job has of each class of its detector, or of each phrase, the most frequent first."""
    counted = counters.read_masks(db, job_id=job_id, kind=MaskCount.CLASS)
    if counted is not None:
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
    statement = text(
        """SELECT coalesce(m.prompt->>'class', m.prompt->>'text') AS class, count(*) AS n
           FROM asset a JOIN mask m ON m.asset_id = a.id
           WHERE a.job_id = :job_id AND coalesce(m.prompt->>'class', m.prompt->>'text') IS NOT NULL
           GROUP BY 1 ORDER BY 2 DESC, 1"""
    )
    return {row[0]: row.n for row in db.execute(statement, {"job_id": job_id})}
