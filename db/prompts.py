"""Prompts of a job: stored by key, joined with the assets they mean, and counted where they meet none."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from sqlalchemy import Connection, text

from db.copying import COPY_ROWS, copy_rows
from db.leases import ClaimedChunk
from db.states import PromptMatch

_PROMPT_KEY = {
    PromptMatch.KEY: "a.key",
    PromptMatch.STEM: r"regexp_replace(a.key, '\.[^./]*$', '')",
    PromptMatch.NUMBER: r"ltrim(regexp_replace(a.key, '^.*/|\.[^./]*$', '', 'g'), '0')",
}


def store_prompts(db: Connection, *, job_id: int, rows: Iterable[tuple[str, str]]) -> None:
    """Store a job's prompts: (key, JSON list of prompts) in any number, read as they come.

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


def prompted_assets(db: Connection, *, chunk: ClaimedChunk, match: PromptMatch) -> set[int]:
    """Which of a chunk's assets the job has prompts for."""
    statement = text(
        f"""SELECT a.id FROM asset a JOIN prompt p ON p.job_id = a.job_id AND p.key = {_PROMPT_KEY[match]}
            WHERE a.job_id = :job_id AND a.id BETWEEN :first AND :last AND p.prompts <> '[]'"""
    )
    values = {"job_id": chunk.job_id, "first": chunk.first_asset_id, "last": chunk.last_asset_id}
    return set(db.execute(statement, values).scalars())


def prompts_of(db: Connection, *, asset_id: int, match: PromptMatch) -> list[Any]:
    """What an asset's job asks of it, each a prompt's JSON or {"error": why it cannot be used}."""
    statement = text(
        f"""SELECT p.prompts FROM asset a JOIN prompt p ON p.job_id = a.job_id AND p.key = {_PROMPT_KEY[match]}
            WHERE a.id = :asset_id"""
    )
    found: list[Any] = db.execute(statement, {"asset_id": asset_id}).scalar_one()
    return found


def unmatched_prompts(db: Connection, *, job_id: int, match: PromptMatch, limit: int) -> tuple[int, list[str]]:
    """Prompts whose key no asset of the job has: how many keys, and the first of them."""
    unmatched = f"""FROM prompt p WHERE p.job_id = :job_id AND NOT EXISTS (
                        SELECT 1 FROM asset a WHERE a.job_id = :job_id AND {_PROMPT_KEY[match]} = p.key)"""
    count = int(db.execute(text(f"SELECT count(*) {unmatched}"), {"job_id": job_id}).scalar_one())
    first = text(f"SELECT p.key {unmatched} ORDER BY p.key LIMIT :limit")
    return count, list(db.execute(first, {"job_id": job_id, "limit": limit}).scalars()) if count else []


def assets_with_unused_prompts(db: Connection, *, job_id: int, limit: int) -> tuple[int, list[tuple[str, str]]]:
    """Labeled assets some of whose prompts could not be used: how many, and the first as (key, why)."""
    statement = text(
        """SELECT a.key, o.error, count(*) OVER () AS n FROM outcome o JOIN asset a ON a.id = o.asset_id
           WHERE o.job_id = :job_id AND o.error_kind IS NULL AND o.error IS NOT NULL ORDER BY a.key LIMIT :limit"""
    )
    rows = db.execute(statement, {"job_id": job_id, "limit": limit}).all()
    return (rows[0].n if rows else 0), [(row.key, row.error) for row in rows]


def classes_of(db: Connection, *, job_id: int) -> dict[str, int]:
    """How many masks a job has of each class of its detector, or of each phrase, the most frequent first."""
    statement = text(
        """SELECT coalesce(m.prompt->>'class', m.prompt->>'text') AS class, count(*) AS n
           FROM asset a JOIN mask m ON m.asset_id = a.id
           WHERE a.job_id = :job_id AND coalesce(m.prompt->>'class', m.prompt->>'text') IS NOT NULL
           GROUP BY 1 ORDER BY 2 DESC, 1"""
    )
    return {row[0]: row.n for row in db.execute(statement, {"job_id": job_id})}
