"""A mirror: a folder, an s3:// or an https:// prefix that has weights under their own file names, and their TOMLs.

Nothing in it is trusted. A file is right when it has the sha256 that was known before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Protocol

from db.settings import settings
from workers.errors import AssetError, ErrorKind, SourceError, TransientError
from workers.models.download import AbsentThere, Manner, download, read_small
from workers.models.own import MAX_TOML_BYTES
from workers.models.part_file import Progress, Wanted, require_room
from workers.models.spec import WeightsError
from workers.models.weights import name_of
from workers.storage.objects import open_objects
from workers.storage.place import Objects


class Mirror(Protocol):
    """A place with files of weights. Every call raises AbsentThere, another WeightsError, or TransientError."""

    def fill(self, file: str, wanted: Wanted, part: BufferedRandom, progress: Progress) -> None:
        """Fill `part` with the mirror's file of this name, and check it. Wrong bytes are not kept."""
        ...

    def read(self, file: str, name: str) -> bytes:
        """A model's TOML, at most one byte longer than it may be."""
        ...

    def put(self, file: str, path: Path) -> None:
        """Store a file under this name. It replaces what is there."""
        ...


def open_mirror(address: str, manner: Manner) -> Mirror:
    """The mirror at an address. Nothing is read. Raises SourceError for an address of another kind."""
    if address.startswith(("https://", "http://")):
        return _Web(address.rstrip("/"), manner)
    if address.startswith("file://"):
        raise SourceError(f"{address}: a mirror in a folder is named by its path, without file://")
    return _Store(address, open_objects(address))


def mirror_of_settings(manner: Manner) -> Mirror | None:
    """The mirror of MASKFLEET_WEIGHTS_MIRROR, if it is set."""
    address = settings().weights_mirror
    return None if address is None else open_mirror(address, manner)


@dataclass(frozen=True, slots=True)
class _Web:
    prefix: str
    manner: Manner

    def fill(self, file: str, wanted: Wanted, part: BufferedRandom, progress: Progress) -> None:
        download(wanted, f"{self.prefix}/{file}", part, progress, self.manner)

    def read(self, file: str, name: str) -> bytes:
        return read_small(f"{self.prefix}/{file}", name=name, max_bytes=MAX_TOML_BYTES, manner=self.manner)

    def put(self, file: str, path: Path) -> None:
        raise WeightsError(f"{self.prefix}: nothing is written to an https mirror; --to FOLDER or s3://bucket/prefix")


@dataclass(frozen=True, slots=True)
class _Store:
    place: str
    objects: Objects

    def fill(self, file: str, wanted: Wanted, part: BufferedRandom, progress: Progress) -> None:
        require_room(wanted, Path(part.name).parent, 0)

        def copy() -> None:
            self.objects.copy(file, part, wanted.max_bytes, lambda done: progress(done, wanted.max_bytes))

        try:
            self._ask(wanted.name, file, copy)
            part.seek(0)
            sha256 = hashlib.file_digest(part, "sha256").hexdigest()
            if sha256 != wanted.sha256:
                said = f"has {name_of(sha256)}; expected sha256 {wanted.sha256}"
                raise WeightsError(f"{wanted.name}: {self._uri(file)} {said}")
        except BaseException:
            part.truncate(0)  # unlike a download, a copy starts at its beginning each time
            raise

    def read(self, file: str, name: str) -> bytes:
        found: list[bytes] = []
        self._ask(name, file, lambda: found.append(self.objects.read(file, MAX_TOML_BYTES)))
        return found[0]

    def put(self, file: str, path: Path) -> None:
        self._ask(path.name, file, lambda: self.objects.write_file(file, path))

    def _ask(self, name: str, file: str, do: Callable[[], object]) -> None:
        try:
            do()
        except AssetError as error:
            if error.kind is ErrorKind.NOT_FOUND:
                raise AbsentThere(f"{name}: nothing at {self._uri(file)}") from error
            raise WeightsError(f"{name}: {self._uri(file)}: {error}") from error
        except TransientError as error:
            raise TransientError(f"{name}: {self._uri(file)}: {error}") from error

    def _uri(self, file: str) -> str:
        return f"{self.place.rstrip('/')}/{file}"
