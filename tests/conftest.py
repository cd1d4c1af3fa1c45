"""Real servers for tests: started once a session, a fresh database a test.

An address in the environment wins; otherwise the server comes from what is installed; otherwise the test is skipped
with its reason, or, with CI set, fails.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text

from db.session import migrate, open_engine, psycopg2_url
from orchestrator.postgres import EmbeddedPostgres

TESTDATA = Path(__file__).parents[2] / "shared" / "testdata"


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server: MASKFLEET_TEST_DATABASE_URL, else the one in the wheel."""
    given = os.environ.get("MASKFLEET_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with EmbeddedPostgres(tmp_path_factory.mktemp("postgres") / "data", durable=False) as server:
        yield server.url


@pytest.fixture(scope="session")
def template_database(postgres_url: str) -> Iterator[str]:
    """The name of a migrated database that tests clone."""
    name = f"maskfleet_template_{secrets.token_hex(4)}"
    _admin(postgres_url, f"CREATE DATABASE {name}")
    migrate(_url_of(postgres_url, name))
    yield name
    _admin(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database_url(postgres_url: str, template_database: str) -> Iterator[str]:
    """The address of a migrated, empty database of this test's own."""
    name = f"maskfleet_test_{secrets.token_hex(4)}"
    _admin(postgres_url, f"CREATE DATABASE {name} TEMPLATE {template_database}")
    yield _url_of(postgres_url, name)
    _admin(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    opened = open_engine(database_url)
    yield opened
    opened.dispose()


@pytest.fixture
def testdata() -> Path:
    """The shared test photos, which are not part of the project."""
    if not TESTDATA.is_dir():
        pytest.skip("the shared test data are not beside this checkout (../shared/testdata)")
    return TESTDATA


def _url_of(server_url: str, database: str) -> str:
    return psycopg2_url(server_url).set(database=database).render_as_string(hide_password=False)


def _admin(server_url: str, statement: str) -> None:
    admin = create_engine(psycopg2_url(server_url), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(statement))
    admin.dispose()
