"""Output files that appear complete or not at all, and small functions that all exports share."""

from __future__ import annotations

import fcntl
import gc
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from db.jobs import Job
from db.settings import settings
from workers.storage.asset import Source
from workers.storage.source import open_source


@contextmanager
def replacing(out: Path) -> Iterator[IO[str]]:
    """Open a text file that replaces `out`, as `beside` says."""
    with beside(out) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        yield file


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """The name of a file beside `out`. It replaces `out` when the block succeeds, and is removed when the block fails.

    A reader sees the old file or the complete new one. Raises FileExistsError when `out` is a folder or a device.
    """
    if out.exists() and not out.is_file():  # asked before links are followed: that of /dev/stdout leads to no name
        raise FileExistsError(f"{out}: expected the name of a file")
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}.{target.name[-200:]}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path, taken: Exception) -> Iterator[None]:
    """Be the one process that writes into a folder. Raises `taken` while another one does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise taken from error
        yield
    finally:
        os.close(descriptor)


def collect_seldom() -> None:
    """Let Python look for garbage less often in this process. Rows go when their page goes, without that search.

    By default it looks after each 700 new rows, which took a quarter of an export's time.
    """
    gc.set_threshold(50_000, 20, 100)


def source_of(job: Job) -> Source:
    """The job's source, only to make addresses. Nothing is read."""
    return open_source(job.source, s3_endpoint=settings().s3_endpoint)


def round_score(value: float | None) -> float | None:
    """The rounded score. None for NaN, which a model may give and JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def json_text(value: Any) -> str:
    """orjson takes a tenth of json's time, but knows no keys that are not text, and no whole numbers above 64 bits."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Make a folder beside `out`. It replaces `out` when the block succeeds, and is removed when the block fails."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: expected a new or empty folder")
    target = out.resolve()
    partial = target.with_name(f".{os.getpid()}.{target.name[-200:]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
