"""Label Studio servers for tests, started once a session, and jobs to publish to them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import create_engine, text

from db.session import psycopg2_url
from orchestrator.label_studio.client import LabelStudio
from orchestrator.local.postgres import EmbeddedPostgres
from tests.label_studio.proxy import Proxy, proxy_of
from tests.label_studio.server import POSTGRES_TEMPLATE, NotInstallable, Server, install, serve
from tests.needs import miss


@pytest.fixture(scope="session")
def installed_label_studio() -> None:
    """Label Studio is installed; without a way to install it the test is skipped, or with CI set fails."""
    try:
        install()
    except NotInstallable as error:
        miss(f"no Label Studio: {error}")


@pytest.fixture(scope="session")
def label_studio(installed_label_studio: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Label Studio on SQLite, as it comes: private addresses are refused, legacy tokens allowed."""
    with serve(tmp_path_factory.mktemp("label-studio")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_with_trigrams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server with the extension pg_trgm, which Label Studio's migrations want and our wheel has not:
    MASKFLEET_TEST_DATABASE_URL, else the machine's own programs."""
    if given := os.environ.get("MASKFLEET_TEST_DATABASE_URL"):
        yield given
        return
    programs = _postgres_programs()
    if programs is None:
        miss("no PostgreSQL with pg_trgm for Label Studio: on Debian, apt-get install postgresql")
    server = EmbeddedPostgres(tmp_path_factory.mktemp("postgres-of-label-studio") / "data", durable=False)
    server._bin = programs
    with server:
        yield server.url


@pytest.fixture(scope="session")
def label_studio_on_postgres(
    installed_label_studio: None, postgres_with_trigrams: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A Label Studio on PostgreSQL, as deployments have it."""
    name = f"label_studio_{os.getpid()}"
    admin = create_engine(psycopg2_url(postgres_with_trigrams), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = psycopg2_url(postgres_with_trigrams)
    socket_dir = parse_qs(urlsplit(postgres_with_trigrams).query).get("host", [""])[0]
    database = {
        "POSTGRE_HOST": url.host or socket_dir,
        "POSTGRE_PORT": str(url.port or 5432),
        "POSTGRE_NAME": name,
        "POSTGRE_USER": url.username or "postgres",
        "POSTGRE_PASSWORD": str(url.password or ""),
    }
    address = url.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
    programs = None if os.environ.get("MASKFLEET_TEST_DATABASE_URL") else _postgres_programs()
    if programs and POSTGRES_TEMPLATE.exists():
        command = [programs / "psql", "--quiet", "--set=ON_ERROR_STOP=1", "--output=/dev/null"]
        subprocess.run([*command, f"--file={POSTGRES_TEMPLATE}", address], check=True)
    with serve(tmp_path_factory.mktemp("label-studio-postgres"), database=database) as server:
        if programs and not POSTGRES_TEMPLATE.exists():
            making = POSTGRES_TEMPLATE.with_name(f"{name}.sql")
            subprocess.run([programs / "pg_dump", "--no-owner", f"--file={making}", address], check=True)
            making.replace(POSTGRES_TEMPLATE)
        yield server
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def client(label_studio: Server) -> Iterator[LabelStudio]:
    with LabelStudio(label_studio.url, label_studio.token) as opened:
        yield opened


def _postgres_programs() -> Path | None:
    """The folder of an installed PostgreSQL's initdb that has the extension, the newest first."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).resolve().parent] if on_path else []
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name, reverse=True)
    for programs in found:
        shares = (programs.parent / "share", Path("/usr/share/postgresql") / programs.parent.name)
        if any(list(share.glob("**/extension/pg_trgm.control")) for share in shares if share.is_dir()):
            return programs
    return None


@pytest.fixture
def proxy(label_studio: Server) -> Iterator[Proxy]:
    with proxy_of(label_studio.url) as running:
        yield running


@pytest.fixture
def through_proxy(proxy: Proxy, label_studio: Server) -> Iterator[LabelStudio]:
    with LabelStudio(proxy.url, label_studio.token) as opened:
        yield opened
