"""`migrate`."""

from __future__ import annotations

from db.migrating import migrate as migrate_database
from orchestrator.cli.app import app, database_url, err


@app.command(epilog="Example: `maskfleet migrate`")
def migrate() -> None:
    """Bring the database's tables to this version; safe to run twice."""
    found, now = migrate_database(database_url())
    if found == now:
        err.print(f"the tables were at migration {now} already")
    else:
        err.print(f"the tables are at migration {now} now, before: {found or 'none'}")
