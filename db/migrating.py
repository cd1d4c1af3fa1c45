"""The migrations that build the tables."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

from db.session import check_not_newer, migration_of, open_engine


def migrate(url: str) -> tuple[str | None, str]:
    """Bring the tables to this version. Two may run at once: an advisory lock lets one through at a time.

    Returns the migration that was found, None for an empty database, and the one that the tables are at now. Raises
    DatabaseNotReady when a newer version made the tables.
    """
    engine = open_engine(url)
    found = check_not_newer(engine)
    command.upgrade(migration_config(url), "head")
    now = migration_of(engine)
    engine.dispose()
    return found, now or ""


def migration_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["url"] = url
    return config
