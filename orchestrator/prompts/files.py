"""Prompt files to rows for the database: JSON lines (or the same as one JSON array), COCO instances, COCO detections,
folders of YOLO labels.

The content decides which format it is. Files are streamed: memory holds the longest line (and for COCO instances the
list of images). What cannot be read is reported with file and line, and the rest is used. If all prompts of a key are
bad, the key is stored with the reasons, and its asset fails with them.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from db.texts import is_storable_key, storable
from orchestrator.prompts import coco as coco_prompts
from orchestrator.prompts import yolo as yolo_prompts
from orchestrator.prompts.entries import BadEntry, Entry, PassedOver, PromptFileError, Reader, shown
from orchestrator.prompts.json_items import items
from workers.errors import AssetError, ErrorKind, redact
from workers.models.spec import ModelSpec
from workers.paths import own_path
from workers.prompts import Prompt, PromptError, PromptKind, parse_prompt, takes
from workers.storage.source import open_source

MOST_LINE_BYTES = 64 * 2**20  # about a hundred thousand prompts on one asset
_KEPT_REPORTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """A prompt file, read and checked. Its rows wait in a temporary file until a job's number is known.

    sha256: of the stored content, so equal files of different names give equal versions. keys, prompts: how many were
    read. bad: the first hundred of bad_count entries that could not be read, with file and line. passed_over: the first
    of passed_over_count files in a folder of labels that hold no labels.
    """

    name: str
    file_format: str
    sha256: str
    keys: int
    prompts: int
    bad_count: int
    bad: tuple[str, ...]
    passed_over_count: int
    passed_over: tuple[str, ...]
    stored: IO[str] = field(repr=False, compare=False)

    def rows(self) -> Iterator[tuple[str, str]]:
        """(key, its prompts as JSON), in the file's order. A key may come several times."""
        self.stored.seek(0)
        for line in self.stored:
            key, _, prompts = line.partition("\t")
            yield json.loads(key), prompts.rstrip("\n")

    def as_json(self) -> dict[str, Any]:
        """What is stored about it on the job's row."""
        return {
            "file": self.name,
            "format": self.file_format,
            "sha256": self.sha256,
            "lines": self.keys,
            "prompts": self.prompts,
            "bad": self.bad_count,
            "bad_first": list(self.bad),
            "passed_over": self.passed_over_count,
            "passed_over_first": list(self.passed_over),
        }


def read_prompts(
    address: str, *, source: str, spec: ModelSpec, s3_endpoint: str | None, besides: tuple[PromptKind, ...] = ()
) -> PromptFile:
    """Read a file, a folder or an s3:// address of prompts for assets of `source`, for this model.

    besides: further kinds of prompts, which the job's detector turns into kinds that the model takes.

    Raises PromptFileError if the whole file cannot be read, has no usable prompt, or has prompts that the model does
    not take. Raises TransientError if the store does not answer.
    """
    with ExitStack() as on_error:
        intake = _Intake(spec=spec, source=source, taken=(*spec.prompts, *besides))
        on_error.enter_context(intake.stored)
        with _open(address, s3_endpoint) as opened, _as_utf_8(opened, address) as file:
            reader = _reader_of(file, address, source, s3_endpoint)
            for entry in reader.entries:
                intake.take(entry)
        if not intake.prompts:
            why = f": {intake.bad[0]}" if intake.bad else ""
            raise PromptFileError(f"{redact(address)}: no usable prompt among {intake.keys} entries{why}")
        on_error.pop_all()
    return PromptFile(
        name=storable(redact(address)),
        file_format=reader.file_format,
        # This word has no meaning today. Without it, JSON lines would give other versions than those stored.
        sha256=hashlib.sha256(f"key\n{intake.digest.hexdigest()}".encode()).hexdigest(),
        keys=intake.keys,
        prompts=intake.prompts,
        bad_count=intake.bad_count,
        bad=tuple(intake.bad),
        passed_over_count=intake.passed_over_count,
        passed_over=tuple(intake.passed_over),
        stored=intake.stored,
    )


class _Intake:
    """Checks entries one by one, writes what is stored, and counts."""

    def __init__(self, *, spec: ModelSpec, source: str, taken: tuple[PromptKind, ...]) -> None:
        self.keys = self.prompts = self.bad_count = self.passed_over_count = 0
        self.bad: list[str] = []
        self.passed_over: list[str] = []
        self.digest = hashlib.sha256()
        self.stored: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n")  # noqa: SIM115  PromptFile's
        self._spec = spec
        self._taken = taken
        self._prefix = source.rstrip("/") + "/"

    def take(self, entry: Entry | BadEntry | PassedOver) -> None:
        if isinstance(entry, PassedOver):
            self.passed_over_count += 1
            self.passed_over += [entry.name] if len(self.passed_over) < _KEPT_REPORTS else []
            return
        if isinstance(entry, BadEntry):
            self._report(entry.where, entry.why)
            return
        if not entry.key or not is_storable_key(entry.key):
            self._report(entry.where, f"key {shown(entry.key)}, expected the asset's name")
            return
        checked = [self._check(entry, index, asked) for index, asked in enumerate(entry.prompts)]
        key = json.dumps(entry.key.removeprefix(self._prefix))
        usable = [prompt.as_json() if isinstance(prompt, Prompt) else None for prompt in checked]
        stored = [p.as_json() if isinstance(p, Prompt) else {"error": p} for p in checked]
        self.stored.write(f"{key}\t{json.dumps(stored)}\n")
        self.digest.update(f"{key}\t{json.dumps(usable, sort_keys=True)}\n".encode())
        self.keys += 1
        self.prompts += sum(prompt is not None for prompt in usable)

    def _check(self, entry: Entry, index: int, asked: object) -> Prompt | str:
        """The prompt as stored, or what is wrong with it. Errors are also reported."""
        try:
            if isinstance(asked, PromptError):
                raise asked
            prompt = parse_prompt(asked)
        except PromptError as error:
            where = f"{entry.where}, prompt {index}" if len(entry.prompts) > 1 else entry.where
            self._report(where, str(error))
            return storable(f"{where}: {error}")
        unfit = takes(prompt, self._taken)
        if unfit:
            raise PromptFileError(f"{entry.where}: {unfit}, which is what {self._spec.name} takes")
        return prompt

    def _report(self, where: str, why: str) -> None:
        self.bad_count += 1
        if len(self.bad) < _KEPT_REPORTS:
            self.bad.append(storable(f"{where}: {why}"))


@contextmanager
def _open(address: str, s3_endpoint: str | None) -> Iterator[IO[bytes] | None]:
    """The file at an address, on this disk. None if it is a folder."""
    if address.startswith("s3://"):
        with tempfile.TemporaryFile() as copy:
            yield copy if _download(address, copy, s3_endpoint) else None
        return
    path = own_path(address)
    try:
        if path.is_dir():
            yield None
            return
        file = path.open("rb")
    except OSError as error:
        raise PromptFileError(
            f"{address}: cannot be read ({error.strerror}); expected a prompt file or folder"
        ) from error
    with file:
        if file.seekable():
            yield file
            return
        with tempfile.TemporaryFile() as copy:  # of a pipe, such as a shell's <(…): readers go back to the start
            shutil.copyfileobj(file, copy)
            copy.seek(0)
            yield copy


@contextmanager
def _as_utf_8(file: IO[bytes] | None, address: str) -> Iterator[IO[bytes] | None]:
    """The file itself, or a copy of one in UTF-16, which some editors and PowerShell write."""
    if file is None or not file.read(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        if file is not None:
            file.seek(0)
        yield file
        return
    file.seek(0)
    with tempfile.TemporaryFile() as copy:
        try:
            shutil.copyfileobj(codecs.EncodedFile(file, "utf-8", "utf-16"), copy)
        except UnicodeDecodeError as error:
            raise PromptFileError(f"{redact(address)}: begins as UTF-16, but is none ({error})") from error
        copy.seek(0)
        yield copy


def _download(address: str, into: IO[bytes], s3_endpoint: str | None) -> bool:
    """Copy an object to this disk. False if no object has this name; then it may be a folder."""
    folder, _, name = address.rpartition("/")
    if not name or folder == "s3:/":
        return False
    from workers.storage.bucket import Bucket  # here, because it loads boto3

    bucket = open_source(folder, s3_endpoint=s3_endpoint)
    assert isinstance(bucket, Bucket)
    try:
        bucket.copy(name, into)
    except AssetError as error:
        if error.kind is ErrorKind.NOT_FOUND:
            return False
        raise PromptFileError(f"{redact(address)}: {error}") from error
    into.seek(0)
    return True


def _reader_of(file: IO[bytes] | None, address: str, source: str, s3_endpoint: str | None) -> Reader:
    if file is None:
        return yolo_prompts.read(address, source=source, s3_endpoint=s3_endpoint)
    name = address.rpartition("/")[2]
    readers: dict[str, Callable[[IO[bytes], str], Reader]] = {
        "instances": coco_prompts.read_instances,
        "detections": coco_prompts.read_detections,
        "our-array": _read_array,
    }
    read = readers.get(coco_prompts.kind_of(file), _read_lines)
    return read(file, name)


def _read_lines(file: IO[bytes], name: str) -> Reader:
    return Reader(file_format="json-lines", entries=_entries_of_lines(file, name))


def _read_array(file: IO[bytes], name: str) -> Reader:
    entries = (_entry_of(f"{name}, entry {n}", item) for n, item in enumerate(items(file, name, "item"), start=1))
    return Reader(file_format="json-array", entries=entries)


def _entries_of_lines(file: IO[bytes], name: str) -> Iterator[Entry | BadEntry]:
    for number, line in _numbered_lines(file):
        where = f"{name}:{number}"
        if line is None:
            yield BadEntry(where, f"longer than {MOST_LINE_BYTES:,} bytes; split it, lines of one key are joined")
        elif line.strip():
            yield _entry_of_line(where, line)


def _numbered_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Lines, numbered from 1. None for a line that is longer than we read."""
    number = 0
    while line := file.readline(MOST_LINE_BYTES):
        number += 1
        if len(line) < MOST_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        yield number, None
        while line and not line.endswith(b"\n"):
            line = file.readline(MOST_LINE_BYTES)


def _entry_of_line(where: str, line: bytes) -> Entry | BadEntry:
    try:
        document = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadEntry(where, f"not UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return BadEntry(where, f"not JSON: {error}")
    return _entry_of(where, document)


def _entry_of(where: str, document: object) -> Entry | BadEntry:
    if not isinstance(document, dict) or not isinstance(document.get("key"), str):
        return BadEntry(where, f'{shown(document)}, expected {{"key": "name.jpg", "prompts": [{{"box_xyxy": […]}}]}}')
    prompts = document.get("prompts")
    # Anything but a list counts as one bad prompt. Its asset fails with the reason.
    return Entry(where, document["key"], prompts if isinstance(prompts, list) else [prompts])


def list_reports(reports: Iterable[str], total: int) -> list[str]:
    """The first reports, to show people. A last line says how many are left out."""
    listed = list(reports)
    return [*listed, f"… and {total - len(listed):,} more"] if total > len(listed) else listed
