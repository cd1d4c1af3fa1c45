"""Label Studio servers for tests, started once a session, and jobs to publish to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import create_engine, text

from db.session import psycopg2_url
from orchestrator.label_studio import LabelStudio
from tests.label_studio.server import NotInstallable, Server, install, serve


@pytest.fixture(scope="session")
def installed_label_studio() -> None:
    """Label Studio is installed; without a way to install it the test is skipped, or with CI set fails."""
    try:
        install()
    except NotInstallable as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no Label Studio: {error}")


@pytest.fixture(scope="session")
def label_studio(installed_label_studio: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Label Studio on SQLite, as it comes: private addresses are refused, legacy tokens allowed."""
    with serve(tmp_path_factory.mktemp("label-studio")) as server:
        yield server


@pytest.fixture(scope="session")
def label_studio_on_postgres(
    installed_label_studio: None, postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A Label Studio on PostgreSQL, as deployments have it."""
    name = f"label_studio_{os.getpid()}"
    admin = create_engine(psycopg2_url(postgres_url), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = psycopg2_url(postgres_url)
    socket_dir = parse_qs(urlsplit(postgres_url).query).get("host", [""])[0]
    database = {
        "POSTGRE_HOST": url.host or socket_dir,
        "POSTGRE_PORT": str(url.port or 5432),
        "POSTGRE_NAME": name,
        "POSTGRE_USER": url.username or "postgres",
        "POSTGRE_PASSWORD": str(url.password or ""),
    }
    with serve(tmp_path_factory.mktemp("label-studio-postgres"), database=database) as server:
        yield server
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def client(label_studio: Server) -> Iterator[LabelStudio]:
    with LabelStudio(label_studio.url, label_studio.token) as opened:
        yield opened
