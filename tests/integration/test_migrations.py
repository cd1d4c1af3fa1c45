from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from sqlalchemy import Engine, create_engine, text

from db.embedding_sweep import sweep_lock
from db.migrating import migrate, migration_config
from db.publishing import LsProject, project_lock
from db.session import DatabaseNotReady, check_migrated, psycopg2_url
from db.tables import Base
from tests.waiting import wait_for

pytestmark = pytest.mark.integration


def test_migrations_build_exactly_the_tables_of_the_models(database_url: str) -> None:
    config = migration_config(database_url)
    config.attributes["models"] = Base.metadata

    command.check(config)


def test_a_database_can_go_down_to_nothing_and_up_again(database_url: str, engine: Engine) -> None:
    command.downgrade(migration_config(database_url), "base")
    with pytest.raises(DatabaseNotReady, match="maskfleet migrate"):
        check_migrated(engine)
    migrate(database_url)
    migrate(database_url)
    check_migrated(engine)


def test_tables_of_a_newer_version_are_left_alone_and_the_way_back_is_said(database_url: str, engine: Engine) -> None:
    with engine.begin() as db:
        db.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    for refused in (lambda: migrate(database_url), lambda: check_migrated(engine)):
        with pytest.raises(
            DatabaseNotReady, match=r"at migration 9999, and this version knows only .* put back the dump"
        ):
            refused()


def test_what_holds_a_lock_for_long_is_refused_behind_a_pooler_that_drops_the_options(database_url: str) -> None:
    pooled = create_engine(psycopg2_url(database_url))
    project = LsProject("http://ls", 1)

    with pytest.raises(DatabaseNotReady, match="a pooler"), project_lock(pooled, ls_project=project, wait=pytest.fail):
        pass
    with pytest.raises(DatabaseNotReady, match="name PostgreSQL itself"), sweep_lock(pooled):
        pass
    pooled.dispose()


def test_a_second_migrate_waits_for_the_first_however_long_that_takes(database_url: str, engine: Engine) -> None:
    config = migration_config(database_url)
    config.attributes["lock_timeout"] = "20ms"
    waiting = "SELECT now() - query_start > interval '200 ms' FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with engine.connect() as first, ThreadPoolExecutor(1) as pool:
        first.execute(text("SELECT pg_advisory_lock(1835103083)"))  # as the first does, of db/migrations/env.py
        second = pool.submit(command.upgrade, config, "head")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            wait_for(lambda: second.done() or db.execute(text(waiting)).scalars().first(), "the second migrate")
        assert not second.done()
        first.execute(text("SELECT pg_advisory_unlock_all()"))
        second.result(timeout=300)
