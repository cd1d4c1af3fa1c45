"""Root's embedded PostgreSQL keeps its data elsewhere, and they end with the folder that they belong to."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from sqlalchemy import text

from db.session import open_engine
from orchestrator.local import postgres
from orchestrator.local.postgres import EmbeddedPostgres
from tests.waiting import wait_for

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


def test_data_of_a_deleted_folder_are_gone_at_once_for_each_of_four_runs_that_start_together(tmp_path: Path) -> None:
    deleted = EmbeddedPostgres(tmp_path / "a" / "postgres").data_dir
    deleted.mkdir()
    for number in range(1500):
        (deleted / str(number)).touch()
    shutil.rmtree(tmp_path / "a")

    context = multiprocessing.get_context("spawn")
    together = context.Barrier(4)
    others = [
        context.Process(target=start_and_look, args=(together, tmp_path / str(number), deleted)) for number in range(4)
    ]
    for other in others:
        other.start()
    for other in others:
        other.join()

    assert [other.exitcode for other in others] == [0, 0, 0, 0]
    # Another test's run, at the same time, may have been the one that took them away, and be still at it.
    wait_for(lambda: not list(deleted.parent.parent.glob(f"gone-{deleted.parent.name}*")), "the end of the data")


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_a_strict_umask_of_root_does_not_keep_the_server_from_its_programs_and_data(
    tmp_path: Path, strict_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not where an earlier run has made the place with such a umask."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr(postgres, "_ROOTS_PLACE", Path(folder) / "place")
        (Path(folder) / "place").mkdir(mode=0o700)

        assert remember(tmp_path / "out" / "postgres", "first") == []


def start_and_look(together: Barrier, owner: Path, deleted: Path) -> None:
    """In a process of its own: what another run does at its start, and whether it then sees the deleted data."""
    together.wait()
    EmbeddedPostgres(owner / "postgres")
    sys.exit(deleted.exists())
