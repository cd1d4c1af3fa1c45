"""A real Label Studio of its own: installed once into `.uv` of this checkout, started on loopback for tests.

Its environment is apart from ours, for it pins what we do not. A clean environment matters: Label Studio takes any
setting from a variable of the plain name, so a stray HOST or DEBUG would change it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.redis_server import free_port
from tests.waiting import wait_for

VERSION = "1.23.2"
ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".uv" / f"label-studio-{VERSION}"
_SQLITE = "label_studio.sqlite3"
USER, PASSWORD = "admin@example.com", "only-on-loopback-1"
TOKEN = "5ca1ab1e" * 5  # of servers that only this machine reaches, for as long as a test runs
# A first boot runs every migration: half a minute, minutes on a busy machine. Later ones begin with what it made.
_TEMPLATE = PLACE / "migrated.sqlite3"
POSTGRES_TEMPLATE = PLACE / "migrated.sql"


class NotInstallable(RuntimeError):
    """Label Studio could not be installed here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running Label Studio. files: its document root for local files. process: for a test that stops it."""

    url: str
    token: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def files(self) -> Path:
        return self.folder / "files"

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]


def install() -> Path:
    """The program label-studio, installed when it is not. Raises NotInstallable."""
    if sys.version_info >= (3, 14):
        raise NotInstallable(
            f"Label Studio {VERSION} does not start on Python 3.14: its django-environ is too old for it"
        )
    program = PLACE / "bin" / "label-studio"
    PLACE.parent.mkdir(exist_ok=True)
    with _alone():
        if not (PLACE / ".complete").exists():
            shutil.rmtree(PLACE, ignore_errors=True)
            for command in _install_commands():
                done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
                if done.returncode != 0:
                    raise NotInstallable(f"{' '.join(command)} gave {done.returncode}: {done.stderr[-500:]}")
            (PLACE / ".complete").touch()
    return program


@contextmanager
def serve(folder: Path, *, database: Mapping[str, str] | None = None, **settings: str) -> Iterator[Server]:
    """Start a server with its data in `folder`; on SQLite, or where the POSTGRE_* variables of `database` say."""
    program = install()
    (folder / "files").mkdir(parents=True)
    (folder / "home").mkdir()
    first_boot = ExitStack()
    if database is None:
        if not _TEMPLATE.exists():
            first_boot.enter_context(_alone())  # the other test processes wait and then take what this one migrates
        if _TEMPLATE.exists():
            shutil.copy(_TEMPLATE, folder / _SQLITE)
    port = free_port()
    environment = {
        "HOME": str(folder / "home"),
        "PATH": "/usr/bin:/bin",
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        **({"DJANGO_DB": "default", **database} if database else {"DJANGO_DB": "sqlite"}),
        "LABEL_STUDIO_USERNAME": USER,
        "LABEL_STUDIO_PASSWORD": PASSWORD,
        "LABEL_STUDIO_USER_TOKEN": TOKEN,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "LABEL_STUDIO_COLLECT_ANALYTICS": "false",
        "LABEL_STUDIO_LATEST_VERSION_CHECK": "false",
        "LABEL_STUDIO_SENTRY_DSN": "",
        "LABEL_STUDIO_FRONTEND_SENTRY_DSN": "",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(folder / "files"),
        **settings,
    }
    command = [str(program), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    with (
        first_boot,
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        server = Server(url=f"http://127.0.0.1:{port}", token=TOKEN, folder=folder, process=process)
        try:
            wait_for(lambda: _answers(server), f"Label Studio, see {folder}/log", seconds=600)
            if database is None and not _TEMPLATE.exists():
                _keep_template(folder / _SQLITE)
            first_boot.close()
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def personal_access_token(server: Server) -> str:
    """Make a personal access token as a person does: log in, then ask for one."""
    with httpx.Client(base_url=server.url, follow_redirects=True, timeout=60) as browser:
        browser.get("/user/login/")
        form = {"email": USER, "password": PASSWORD, "csrfmiddlewaretoken": browser.cookies["csrftoken"]}
        browser.post("/user/login/", data=form).raise_for_status()
        answer = browser.post("/api/token/", headers={"X-CSRFToken": browser.cookies["csrftoken"]})
        answer.raise_for_status()
        return str(answer.json()["token"])


@contextmanager
def _alone() -> Iterator[None]:
    with (PLACE.parent / "label-studio.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install_commands() -> list[list[str]]:
    package, python = f"label-studio=={VERSION}", str(PLACE / "bin" / "python")
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    if Path(uv).exists():
        return [
            [uv, "venv", "--python", sys.executable, str(PLACE)],
            [uv, "pip", "install", "--python", python, package],
        ]
    return [[sys.executable, "-m", "venv", str(PLACE)], [python, "-m", "pip", "install", "--quiet", package]]


def _keep_template(database: Path) -> None:
    """Keep a database that has the user and the token, and nothing else yet, for later servers."""
    making = _TEMPLATE.with_name(f"{_TEMPLATE.name}.{os.getpid()}")
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(making)) as copy:
        source.backup(copy)
    making.replace(_TEMPLATE)


def _answers(server: Server) -> bool:
    if server.process.poll() is not None:
        raise AssertionError(f"Label Studio ended with {server.process.returncode}:\n{server.log()}")
    try:
        return httpx.get(f"{server.url}/health", timeout=30).is_success
    except httpx.TransportError:
        time.sleep(0.2)
        return False
