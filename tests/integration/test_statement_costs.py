"""Cost follows what is asked, not how much is stored: every function of db/ on a large database.

MASKFLEET_TEST_ASSETS=1000000 fills 1,000,000 assets with 4,000,000 masks and 100,000 tasks. The usual size is a tenth:
then a statement that reads a job as a whole exceeds its pages already, and `make test` stays short.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import GeneratorType

import pytest
from sqlalchemy import Engine, create_engine, text

from db import results
from db.session import open_engine
from tests.filled import Filled, fill
from tests.statement_arguments import arguments
from tests.statement_costs import CALL, JOB, NO_STATEMENT, PAGE, measured

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ASSETS = int(os.environ.get("MASKFLEET_TEST_ASSETS", "100000"))
ROOT = Path(__file__).parents[2]


def functions() -> Iterator[str]:
    """The public functions of db/ that take a connection, as module.function."""
    for path in sorted((ROOT / "db").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            if [argument.arg for argument in node.args.args[:1]] == ["db"]:
                yield f"{path.stem}.{node.name}"


@pytest.fixture(scope="module")
def large(postgres_url: str, template_database: str) -> Iterator[tuple[Engine, Filled]]:
    """One filled database for the file. Each call is rolled back."""
    name = f"{template_database}_filled"
    admin = create_engine(open_engine(postgres_url).url, isolation_level="AUTOCOMMIT")
    with admin.connect() as db:
        db.execute(text(f"CREATE DATABASE {name} TEMPLATE {template_database}"))
    url = admin.url.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
    engine = open_engine(url)
    yield engine, fill(engine, assets=ASSETS)
    engine.dispose()
    with admin.connect() as db:
        db.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


def test_each_function_of_db_has_a_class() -> None:
    classes = [*CALL, *PAGE, *JOB, *NO_STATEMENT]
    assert sorted(classes) == sorted(set(classes))
    assert sorted(functions()) == sorted(classes)


@pytest.mark.parametrize("name", [*CALL, *PAGE, *sorted(JOB)])
def test_a_function_touches_no_more_pages_than_its_class_says(large: tuple[Engine, Filled], name: str) -> None:
    _require_class(*large, name)


@pytest.mark.parametrize(
    "name", ["publishing.unpublished", "review_order.pairs", "review_order.unpublished_without_order"]
)
def test_a_page_begins_at_its_place_where_the_planner_merges_tables(large: tuple[Engine, Filled], name: str) -> None:
    # With the usual costs the sample that ANALYZE took decides between a merge and a look for each row.
    _require_class(*large, name, random_page_cost=10)


def test_masks_that_are_copied_out_are_found_by_their_key(large: tuple[Engine, Filled]) -> None:
    engine, filled = large
    read = text(
        "SELECT sum(seq_tup_read), sum(idx_tup_fetch) FROM pg_stat_xact_user_tables WHERE relname LIKE 'mask_part%'"
    )
    with engine.connect() as db:
        given = arguments(db, filled, "results.masks_csv")
        scanned, fetched = db.execute(read).one()
        found = results.masks_csv(db, job_id=given["job_id"], asset_ids=given["asset_ids"])

        assert found.count(b"\n") > 0
        assert db.execute(read).one() == (scanned, fetched + found.count(b"\n"))


def _require_class(engine: Engine, filled: Filled, name: str, random_page_cost: int = 4) -> None:
    module, _, function_name = name.partition(".")
    function = getattr(importlib.import_module(f"db.{module}"), function_name)
    with engine.connect() as db, db.begin() as transaction:
        given = arguments(db, filled, name)
        taken = [p for p in inspect.signature(function).parameters if p != "db"]
        db.execute(text(f"SET LOCAL random_page_cost = {random_page_cost}"))
        with measured(engine) as costs:
            done = function(db, **{parameter: given[parameter] for parameter in taken})
            if isinstance(done, GeneratorType):
                list(islice(done, 64))
        transaction.rollback()

    most = {**CALL, **PAGE}.get(name)
    if most is not None:
        dear = [cost for cost in costs if cost.pages > most or cost.scanned]
        assert not dear, f"more than {most} pages, or a whole table: {dear}"


def test_the_measure_sees_a_statement_that_reads_a_job_as_a_whole(large: tuple[Engine, Filled]) -> None:
    engine, filled = large
    with engine.connect() as db, measured(engine) as costs:
        db.execute(text("SELECT count(*), sum(segment_ms) FROM outcome WHERE job_id = :id"), {"id": filled.job_id})
    assert costs[0].pages > 500
    assert costs[0].scanned
