"""How the database has the prompt of a mask: a lone point takes a third of the bytes, and no reader sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from db import results
from db.migrating import migrate, migration_config
from tests.factories import chunk_ids, claim, labeled, make_job, record

pytestmark = pytest.mark.integration

LONE_POINTS = (
    {"points": [[512.5, 341.328125, 1]]},
    {"points": [[7, 0, 1]]},
    {"points": [[0.1, 1e-07, 1]]},
    {"points": [[99999.99999999999, -0.25, 1]]},
)
OTHERS = (
    {"points": [[512.5, 341.5, 0]]},
    {"points": [[512.5, 341.5, 1], [7.5, 8.5, 1]]},
    {"points": [[512.5, 341.5, 1]], "label": "car"},
    {"box_xyxy": [1.5, 2.5, 30.25, 40.0], "class": "car", "score": 0.875},
    {"text": 'a "null" word'},
    None,
)


def with_prompts(engine: Engine, prompts: tuple[dict[str, Any] | None, ...]) -> list[dict[str, Any] | None]:
    """Store masks with these prompts, as a worker does. Returns the prompts as they are read."""
    job = make_job(engine, keys=["a.jpg"])
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    outcome = labeled(chunk.first_asset_id, masks=len(prompts))
    masks = [replace(mask, prompt=prompt) for mask, prompt in zip(outcome.masks, prompts, strict=True)]
    record(engine, chunk, [replace(outcome, masks=masks)])
    return read_prompts(engine)


def read_prompts(engine: Engine) -> list[dict[str, Any] | None]:
    with engine.connect() as db:
        ids = db.execute(text("SELECT DISTINCT asset_id FROM mask")).scalars().all()
        return [mask.prompt for masks in results.masks_of(db, asset_ids=ids).values() for mask in masks]


def stored_types(engine: Engine) -> list[str | None]:
    with engine.connect() as db:
        return list(db.execute(text("SELECT jsonb_typeof(prompt) FROM mask ORDER BY asset_id, n")).scalars())


def test_a_prompt_is_read_exactly_as_it_was_given_and_a_lone_point_is_a_string_in_the_table(engine: Engine) -> None:
    read = with_prompts(engine, (*LONE_POINTS, *OTHERS))

    assert read == [*LONE_POINTS, *OTHERS]
    assert repr(read[: len(LONE_POINTS)]) == repr([*LONE_POINTS])  # 7 is 7, not 7.0
    assert stored_types(engine) == ["string"] * len(LONE_POINTS) + ["object"] * (len(OTHERS) - 1) + [None]


def test_a_lone_point_takes_less_than_half_of_the_bytes_of_an_object(engine: Engine) -> None:
    with_prompts(engine, (LONE_POINTS[0],))

    with engine.connect() as db:
        short, whole = db.execute(
            text("SELECT pg_column_size(prompt), pg_column_size(CAST(:whole AS jsonb)) FROM mask"),
            {"whole": '{"points": [[512.5, 341.328125, 1]]}'},
        ).one()
    assert short < whole / 2


def test_a_point_that_is_no_number_is_refused(engine: Engine) -> None:
    with pytest.raises(DBAPIError, match="json"):
        with_prompts(engine, ({"points": [[float("nan"), 1.5, 1]]},))


def test_prompts_from_before_migration_0016_are_read_and_the_way_down_writes_them_again(
    engine: Engine, database_url: str
) -> None:
    asked = (*LONE_POINTS[:3], *OTHERS)
    with_prompts(engine, asked)
    engine.dispose()

    command.downgrade(migration_config(database_url), "0015")

    assert set(stored_types(engine)) == {"object", None}
    assert read_prompts(engine) == list(asked)
    migrate(database_url)
    assert read_prompts(engine) == list(asked)
