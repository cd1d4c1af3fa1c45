"""An export in parts of some assets each, in one folder. A killed export goes on with the same command.

    OUT/export.json     what was asked, the finished parts with their last keys, and whether all is there
    OUT/part-00000…     the parts, as their format names them

A part is written beside its place and renamed, then named in export.json. So a part that is named is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from db.results import LabeledAsset
from orchestrator.export.errors import ExportError
from orchestrator.export.files import alone_in
from workers.errors import AssetError, ErrorKind
from workers.paths import own_path
from workers.storage.objects import open_objects
from workers.storage.place import Objects

_NAME = "export.json"
_MOST_BYTES = 1 << 26  # of export.json
_PART = re.compile(r"part-[0-9]{5,}(\.[a-z]+)?")

WritePart = Callable[[Path, Iterable[LabeledAsset]], list[str] | None]


@dataclass(slots=True)
class Parts:
    """What export.json holds. request: the question; another one does not go on in this place.

    folder: where parts are written. For a bucket it is a folder of this machine that `store` empties into the bucket.
    bucket: its address, None for a folder. goes_on: a stopped export was here before.
    """

    place: Objects
    folder: Path
    request: dict[str, Any]
    bucket: str | None = None
    finished: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    goes_on: bool = False

    @property
    def last_key(self) -> str:
        """The key after which the next part begins."""
        return str(self.finished[-1]["last_key"]) if self.finished else ""

    def store(self) -> None:
        """Name the finished parts in export.json. Their files go to the place before it."""
        if self.bucket is not None:
            upload(self.folder, self.bucket)
        document = {"request": self.request, "complete": self.complete, "parts": self.finished}
        self.place.write(_NAME, f"{json.dumps(document, ensure_ascii=False, indent=1)}\n".encode())

    def finish(self) -> None:
        """Say that all is there. Parts that nobody named go: with other --processes an export may have more of them."""
        names = {part["name"] for part in self.finished}
        if self.goes_on and self.bucket is not None:
            for name in [stored.name for stored in self.place.stored()]:
                part = name.removeprefix("masks/").removeprefix("assets/").partition("/")[0]
                if _PART.fullmatch(part) and part not in names:
                    self.place.delete(name)
        elif self.goes_on:
            found = [path for below in ("", "masks/", "assets/") for path in self.folder.glob(f"{below}part-*")]
            for path in found:
                if _PART.fullmatch(path.name) and path.name not in names:
                    _remove(path)
        self.complete = True
        self.store()

    def notes(self) -> list[str]:
        """For people: those of the first part that has some, and how many more parts have notes."""
        noted = [part for part in self.finished if part["notes"]]
        said = [str(note) for note in noted[0]["notes"]] if noted else []
        name = noted[0]["name"] if noted else ""
        said = [note if note.startswith(name) else f"{name}: {note}" for note in said]
        return said + ([f"{len(noted) - 1:,} more parts have notes: export.json has them"] if len(noted) > 1 else [])

    def count(self, name: str) -> int:
        """The sum of "assets" or "masks" of the parts."""
        return sum(int(part[name]) for part in self.finished)


@contextmanager
def open_parts(out: str, request: dict[str, Any]) -> Iterator[Parts]:
    """The export at `out`, a folder or s3://bucket/prefix: a new or empty place, or one with the same request.

    A folder is for this process alone. Raises ExportError for any other place, and while another process writes there.
    """
    place = open_objects(out)
    if "://" in out:
        with TemporaryDirectory(prefix="maskfleet-export-") as staging:
            yield _begun(Parts(place, Path(staging), request, bucket=out), out)
        return
    folder = own_path(out).absolute()
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{out}: is a file; an export in parts needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, ExportError(f"{folder}: another export writes there now")):
        parts = _begun(Parts(place, folder, request), out)
        for path in (*folder.glob(".*.partial"), *folder.glob("masks/.*.partial"), *folder.glob("assets/.*.partial")):
            _remove(path)  # of a killed writer
        yield parts


def _begun(parts: Parts, out: str) -> Parts:
    """Take over what is finished, or begin."""
    try:
        content = parts.place.read(_NAME, _MOST_BYTES)
    except AssetError as error:
        if error.kind is not ErrorKind.NOT_FOUND:
            raise
        if next(parts.place.stored(), None) is not None:
            raise ExportError(f"{out}: expected a new or empty place, or an export in parts to go on with") from error
        parts.store()
        return parts
    try:
        document = json.loads(content)
        request = dict(document["request"])
        parts.finished, parts.complete = list(document["parts"]), bool(document["complete"])
        parts.goes_on = not parts.complete
        parts.last_key, parts.count("assets"), parts.count("masks")
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{out}/{_NAME}: is not of an export in parts: name another place") from error
    names = sorted({*request, *parts.request})
    differ = [name for name in names if request.get(name) != parts.request.get(name)]
    if differ:
        found = ", ".join(f"{name} was {request.get(name)!r}, is {parts.request.get(name)!r}" for name in differ)
        raise ExportError(f"{out}: holds another export ({found}): name another place")
    return parts


def upload(folder: Path, out: str) -> None:
    """Move the parts in a folder of this machine to s3://bucket/prefix.

    A part that is a folder has no other files there afterwards. A stopped export with other --processes may have left
    a part of this name, with other assets.
    """
    place = open_objects(out)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        place.write_file(path.relative_to(folder).as_posix(), path)
    for part in [part for part in folder.glob("part-*") if part.is_dir()]:
        below = open_objects(f"{out.rstrip('/')}/{part.name}")
        for name in [stored.name for stored in below.stored()]:
            if not (part / name).is_file():
                below.delete(name)
    for path in list(folder.iterdir()):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_parts(
    parts: Parts, assets: Iterable[LabeledAsset], write: WritePart, *, part_assets: int, suffix: str
) -> None:
    """Write the parts that are not there yet. assets: those after `parts.last_key`, in key order.

    There is one part at least, so that a reader finds a file.
    """
    rest = iter(assets)
    while (first := list(islice(rest, 1))) or not parts.finished:
        path = parts.folder / f"part-{len(parts.finished):05}{suffix}"
        entry = write_part(path, chain(first, islice(rest, part_assets - 1)), write)
        parts.finished.append(entry)
        parts.store()


def write_part(path: Path, assets: Iterator[LabeledAsset], write: WritePart) -> dict[str, Any]:
    """Write one part. Returns its entry of export.json."""
    if path.is_dir():
        _remove(path)  # its writer was killed before it could name it
    counted = Counted(assets)
    notes = write(path, counted) or []
    return {
        "name": path.name,
        "assets": counted.assets,
        "masks": counted.masks,
        "last_key": counted.last_key,
        "notes": notes,
    }


class Counted:
    """Assets on their way into a part. masks: those that came with them; who reads them apart adds them."""

    def __init__(self, assets: Iterator[LabeledAsset]) -> None:
        self._rest = assets
        self.assets = self.masks = 0
        self.last_key = ""

    def __iter__(self) -> Iterator[LabeledAsset]:
        for asset in self._rest:
            self.assets += 1
            self.masks += len(asset.masks)
            self.last_key = asset.key
            yield asset
