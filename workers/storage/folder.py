"""A folder of this machine as a source of assets.

Keys are listed in the binary order of their UTF-8. A link that leads out of the folder is not followed.
"""
# ruff: noqa: PTH116, PTH117, PTH118, PTH123
# File names are bytes here, so that a name that is not UTF-8 can be reported. pathlib knows only str.

from __future__ import annotations

import errno
import os
import stat
import urllib.parse
from collections import Counter
from collections.abc import Iterator

from db.texts import is_storable_key
from workers.errors import AssetError, ErrorKind, SourceError, TransientError
from workers.storage.asset import PAGE_SIZE, Content, Listed, Page, SkipReason, check_size

_MOST_BYTES = 80_000_000  # of names held for one folder, 1.3 million of usual length; twice that while it is read
_BYTES_OF_ANY_NAME = 45  # of a bytes object and its place in a list


class Folder:
    """Files below one directory. Nothing outside is listed or read, even if a key or a link leads there."""

    def __init__(self, root: str) -> None:
        if not os.path.isabs(root) or "\0" in root:
            raise SourceError(f"{root!r}: expected an absolute path: workers do not run in your folder")
        self._root = os.fsencode(os.path.normpath(root))

    def uri(self, key: str) -> str:
        return "file://" + urllib.parse.quote(os.path.join(self._root, key.encode()))

    def check(self) -> None:
        next(_scan(self._root), None)

    def list(self, after: str = "") -> Iterator[Page]:
        real_root = os.path.realpath(self._root)
        below = self._root.rstrip(b"/") + b"/"
        objects: list[Listed] = []
        skipped: Counter[SkipReason] = Counter()
        cursor = after
        for found in _walk(self._root, after.encode()):
            if isinstance(found, SkipReason):
                skipped[found] += 1
            else:
                entry = _stat_file(below, real_root, found)
                if isinstance(entry, Listed):
                    objects.append(entry)
                    cursor = entry.key
                elif entry:
                    skipped[entry] += 1
            if len(objects) + skipped.total() >= PAGE_SIZE:
                yield Page(objects=objects, cursor=cursor, skipped=skipped)
                objects, skipped = [], Counter()
        if objects or skipped:
            yield Page(objects=objects, cursor=cursor, skipped=skipped)

    def named(self, key: str, size_bytes: int | None, etag: str | None) -> Listed | SkipReason:
        encoded = key.encode()
        if os.path.isabs(encoded) or os.path.normpath(encoded) != encoded or encoded.split(b"/")[0] == b"..":
            return SkipReason.NOT_A_KEY
        below, real_root = self._root.rstrip(b"/") + b"/", os.path.realpath(self._root)
        found = _stat_file(below, real_root, encoded) or SkipReason.NOT_FOUND
        is_out = isinstance(found, Listed) and not _is_inside(below + encoded, real_root)
        return SkipReason.LINK_OUT if is_out else found

    def read(self, key: str, max_bytes: int) -> bytes:
        return self.read_with_etag(key, max_bytes).content

    def read_with_etag(self, key: str, max_bytes: int) -> Content:
        path = os.path.join(self._root, key.encode())
        if "\0" in key or not _is_inside(path, os.path.realpath(self._root)):
            raise AssetError(ErrorKind.FORBIDDEN, f"{key!r}: leads out of the folder {os.fsdecode(self._root)}")
        try:
            # If a FIFO took the file's place, an open without O_NONBLOCK would wait without end.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise AssetError(ErrorKind.NOT_FOUND, f"{key}: is no longer a regular file")
                check_size(key, status.st_size, max_bytes)
                content = file.read(max_bytes + 1)
                after = os.fstat(descriptor)
        except OSError as error:
            raise file_error(key, error) from error
        check_size(key, len(content), max_bytes)  # it may have grown in the meantime
        # Bytes from before and after a write are those of no listing.
        return Content(
            content=content, etag=_etag(status) if _etag(after) == _etag(status) else f"{_etag(after)}-mixed"
        )


def _etag(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _walk(root: bytes, after: bytes) -> Iterator[bytes | SkipReason]:
    """Yield keys of the files below `root` after `after`, in binary order, and a reason for each folder left out.

    A folder sorts as its name with a slash, as inside whole keys: "a.jpg" < "a/b" < "a0". Memory holds only names in
    the folders on the path to the current file, _MOST_BYTES of each at most.
    """
    on_the_way = [(b"", _in_order(root, after))]
    while on_the_way:
        prefix, names = on_the_way[-1]
        name = next(names, None)
        if name is None:
            on_the_way.pop()
            continue
        key = prefix + name
        if not key.endswith(b"/"):
            if key > after:
                yield key
        elif key > after or after.startswith(key):
            try:
                rest = after[len(key) :] if after.startswith(key) else b""
                on_the_way.append((key, _in_order(os.path.join(root, key), rest)))
            except SourceError:
                if os.path.lexists(os.path.join(root, key)):  # else it was removed during the listing
                    yield SkipReason.UNREADABLE_FOLDER


def _in_order(directory: bytes, after: bytes) -> Iterator[bytes]:
    """The names in a directory in order; folders end in a slash. Names before `after` may be left out.

    It is read again when its names are more than fit into memory. Raises SourceError for the first reading, at once.
    """
    start = after.partition(b"/")[0]  # a folder of this name holds the key
    return _read_on(directory, *_first_names(directory, start))


def _read_on(directory: bytes, names: list[bytes], is_all: bool) -> Iterator[bytes]:
    while names:
        last = names[-1]
        names.reverse()
        while names:
            yield names.pop()  # frees it
        if is_all:
            return
        try:
            names, is_all = _first_names(directory, last)
        except SourceError as error:
            raise TransientError(f"its listing broke off: {error}") from error
        names = names[1:] if names[:1] == [last] else names


def _first_names(directory: bytes, start: bytes) -> tuple[list[bytes], bool]:
    """The first names from `start` on, in order, and whether these are all."""
    names: list[bytes] = []
    held_bytes, is_all, last = 0, True, b"\xff" * 256  # no name is longer than 255
    for name in _scan(directory):
        if start <= name <= last:
            names.append(name)
            held_bytes += len(name) + _BYTES_OF_ANY_NAME
            if held_bytes > 2 * _MOST_BYTES:
                names.sort()
                del names[len(names) // 2 :]
                held_bytes //= 2
                is_all, last = False, names[-1]
    names.sort()
    return names, is_all


def _scan(directory: bytes) -> Iterator[bytes]:
    """Names in a directory; folders end in a slash. Raises SourceError, which says why it cannot be read."""
    shown = os.fsdecode(directory)
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                yield entry.name + b"/" if entry.is_dir(follow_symlinks=False) else entry.name
    except FileNotFoundError as error:
        raise SourceError(f"{shown}: no such folder; check the path, and that it is mounted on this machine") from error
    except NotADirectoryError as error:
        raise SourceError(f"{shown}: is a file; give the folder that holds it") from error
    except OSError as error:
        raise SourceError(f"{shown}: cannot be listed ({error.strerror}); may this user read and enter it?") from error


def _stat_file(below: bytes, real_root: bytes, key: bytes) -> Listed | SkipReason | None:
    """The entry at `key`. None if it was removed after its folder was read. below: the root, with a slash."""
    path = below + key
    try:
        name = key.decode()
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            status = os.stat(path)
            if not _is_inside(path, real_root):
                return SkipReason.LINK_OUT
        if not is_storable_key(name):
            return SkipReason.UNSTORABLE_NAME
    except UnicodeDecodeError:
        return SkipReason.UNSTORABLE_NAME
    except FileNotFoundError:
        if not os.path.lexists(path):
            return None
        return SkipReason.NOT_A_FILE if _is_inside(path, real_root) else SkipReason.LINK_OUT
    except OSError:
        return SkipReason.NOT_A_FILE  # a circle of links, or a link into a folder that we may not enter
    if not stat.S_ISREG(status.st_mode):
        return SkipReason.NOT_A_FILE
    return Listed(key=name, size_bytes=status.st_size, etag=_etag(status))


def _is_inside(path: bytes, real_root: bytes) -> bool:
    """True if the path, with all links followed, is below the root. The root itself has no links."""
    return os.path.realpath(path).startswith(real_root.rstrip(b"/") + b"/")


def file_error(key: str, error: OSError) -> Exception:
    """What a failed open or read means for the asset. All but "gone" and "forbidden" is a disk fault that may pass."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):
        return AssetError(ErrorKind.NOT_FOUND, f"{key}: no longer in the folder ({error.strerror})")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AssetError(ErrorKind.FORBIDDEN, f"{key}: this user may not read the file ({error.strerror})")
    return TransientError(f"{key}: {error.strerror}")
