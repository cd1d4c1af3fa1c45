"""The embedded PostgreSQL after a kill or a restart of the machine: what it left is stopped, and nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from db.session import open_engine
from orchestrator.local.postgres import EmbeddedPostgres, remove_sockets
from tests.waiting import wait_for

pytestmark = pytest.mark.integration


def test_the_server_that_a_killed_run_left_is_stopped(tmp_path: Path) -> None:
    left, server = EmbeddedPostgres(tmp_path / "postgres"), EmbeddedPostgres(tmp_path / "postgres")
    left.__enter__()
    pid = int((left.data_dir / "postmaster.pid").read_text().split()[0])
    with server:
        wait_for(lambda: not lives(pid), "the end of what was left")  # its process outlives its pid file by a moment


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="what a process is cannot be seen here")
def test_a_program_that_has_the_servers_old_number_lives_on(tmp_path: Path) -> None:
    """After a power cut postmaster.pid is still there, and another program of this user may have its number."""
    server = EmbeddedPostgres(tmp_path / "postgres")
    with server:
        lines = (server.data_dir / "postmaster.pid").read_text().splitlines()
    user = None if os.geteuid() else "nobody"
    with subprocess.Popen(["sleep", "600"], user=user, cwd="/") as other:
        try:
            pid_file = server.data_dir / "postmaster.pid"
            pid_file.write_text("\n".join([str(other.pid), *lines[1:]]) + "\n")
            server._give(pid_file)
            with server:
                assert other.poll() is None
        finally:
            other.kill()


def lives(pid: int) -> bool:
    """Whether a program runs there. What has ended stays a zombie until its parent asks for it."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("named", ["work", "work/maskfleet-pg-of-somebody", ""])
def test_an_address_file_names_no_folder_that_is_removed_but_a_servers_own(named: str, tmp_path: Path) -> None:
    (tmp_path / "work" / "maskfleet-pg-of-somebody").mkdir(parents=True)

    remove_sockets(f"postgresql://postgres@/postgres?host={tmp_path / named}")

    assert (tmp_path / "work" / "maskfleet-pg-of-somebody").is_dir()


def test_the_sockets_of_a_server_that_answers_are_left(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "postgres", durable=False) as server:
        remove_sockets(server.url)
        open_engine(server.url).connect().close()
