from __future__ import annotations

import pytest
from alembic import command
from sqlalchemy import Engine

from db.migrating import migrate, migration_config
from db.session import DatabaseNotReady, check_migrated

pytestmark = pytest.mark.integration


def test_migrations_build_exactly_the_tables_of_the_models(database_url: str) -> None:
    command.check(migration_config(database_url))


def test_a_database_can_go_down_to_nothing_and_up_again(database_url: str, engine: Engine) -> None:
    command.downgrade(migration_config(database_url), "base")
    with pytest.raises(DatabaseNotReady, match="maskfleet migrate"):
        check_migrated(engine)
    migrate(database_url)
    migrate(database_url)
    check_migrated(engine)
