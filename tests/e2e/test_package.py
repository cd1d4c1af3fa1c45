"""The built package has all that it needs: installed into an empty environment, used from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.needs import miss

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def test_the_wheel_runs_the_demo_in_an_environment_without_this_checkout(tmp_path: Path) -> None:
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    if not Path(uv).exists():
        miss("no uv: `make setup` brings one")
    call([uv, "build", "--wheel", "--out-dir", str(tmp_path / "dist"), str(ROOT)])
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    call([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")])
    python = tmp_path / "venv" / "bin" / "python"
    call([uv, "pip", "install", "--no-deps", "--python", str(python), str(wheel)])
    # The dependencies are those that are installed here. A path of a .pth file is searched last, and the .pth files in
    # it (one leads to this checkout) are not read.
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    where = call([str(python), "-c", "import orchestrator, workers, db; print(orchestrator.__file__)"], cwd=tmp_path)
    done = call([str(tmp_path / "venv" / "bin" / "maskfleet"), "demo", "--out", "out"], cwd=tmp_path)

    assert where.startswith(str(site_packages))
    assert "13 assets: 9 labeled" in done
    assert (tmp_path / "out" / "index.html").stat().st_size > 100_000


def call(command: list[str], *, cwd: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MASKFLEET_", "PYTHON"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
