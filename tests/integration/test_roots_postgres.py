"""Root's embedded PostgreSQL keeps its data elsewhere, and they end with the folder that they belong to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from sqlalchemy import text

from db.session import open_engine
from orchestrator.local.postgres import EmbeddedPostgres

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="others have their data where they want them"),
]


def remember(data_dir: Path, word: str) -> list[str]:
    """The words that these data hold, before this one is added."""
    with EmbeddedPostgres(data_dir) as server:
        engine = open_engine(server.url)
        with engine.begin() as db:
            db.execute(text("CREATE TABLE IF NOT EXISTS word (word text)"))
            words = list(db.execute(text("SELECT word FROM word")).scalars())
            db.execute(text("INSERT INTO word VALUES (:word)"), {"word": word})
        engine.dispose()
        return words


def test_a_new_folder_does_not_find_the_data_of_a_deleted_one_of_its_name(tmp_path: Path) -> None:
    data_dir = tmp_path / "out" / ".maskfleet" / "postgres"
    assert remember(data_dir, "first") == []
    assert remember(data_dir, "second") == ["first"]

    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out" / ".maskfleet").mkdir(parents=True)

    assert remember(data_dir, "third") == []


def test_data_of_a_deleted_folder_are_removed_by_the_next_run_but_not_under_a_server(tmp_path: Path) -> None:
    deleted, served = EmbeddedPostgres(tmp_path / "a" / "postgres"), EmbeddedPostgres(tmp_path / "b" / "postgres")
    with deleted:
        pass
    with served:
        shutil.rmtree(tmp_path / "a")
        shutil.rmtree(tmp_path / "b")
        EmbeddedPostgres(tmp_path / "c" / "postgres")

        assert not deleted.data_dir.exists()
        assert served.data_dir.exists()
    EmbeddedPostgres(tmp_path / "c" / "postgres")
    assert not served.data_dir.exists()
