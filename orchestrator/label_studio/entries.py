"""What is sent to Label Studio for one asset, as JSON. Many assets are worked on at once, in processes of their own.

Finding the regions is most of our work. On one core it would take longer than the server's import.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from orchestrator.label_studio.addresses import address_faults
from orchestrator.label_studio.config import Controls, address_regions, faults
from orchestrator.label_studio.errors import LabelStudioError
from orchestrator.label_studio.names import RegionKind
from orchestrator.label_studio.regions import Regions, prediction_task, regions_for
from workers.allocator import keep_freed_memory
from workers.machine import usable_cores
from workers.masks import Mask

# Some proxies stop at 10 MB; 8 MB pass.
MAX_BYTES = 8_000_000
# The limit of Label Studio's page: it needs 20 s and more for fifty brushes on a megapixel, and 5 s for polygons.
MAX_BRUSH = 20
# A million bytes are 4 MB of JSON, half of what one request may hold, and the page decodes every byte.
MAX_BRUSH_BYTES = 1_000_000
_MOST_PROCESSES = 4  # two are fast enough for a server that shares their two cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The values that all entries of one job and project share."""

    controls: Controls
    as_: RegionKind
    max_masks: int
    model_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Labeled:
    """One asset to be sent. address: where Label Studio finds the image. asset_uid: its data.asset_id there."""

    asset_id: int
    asset_uid: str
    uri: str
    address: str
    task_id: int | None
    size_hw: tuple[int, int]
    masks: Sequence[Mask]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One asset, ready to be sent: JSON of its task's data and of its prediction.

    ious: IoU 0..1 of each shown mask with its regions. error: why the project's config cannot hold it.
    """

    asset_id: int
    asset_uid: str
    uri: str
    task_id: int | None
    data: bytes
    prediction: bytes
    mask_count: int
    ious: tuple[float, ...]
    error: str | None

    @property
    def size_bytes(self) -> int:
        return len(self.data) + len(self.prediction) + 64


def entries_of(plan: Plan, groups: Iterator[Sequence[Labeled]]) -> Iterator[list[Entry]]:
    """The entries of each group, in order. While one group is used, the next ones are made.

    A single group is made in this process, and on a single core all are. Raises LabelStudioError if a process died.
    """
    build = partial(build_entries, plan)
    processes = min(usable_cores(), _MOST_PROCESSES)
    first = list(itertools.islice(groups, 2))
    groups = itertools.chain(first, groups)
    if processes == 1 or len(first) < 2:
        yield from map(build, groups)
        return
    ahead: deque[Future[list[Entry]]] = deque()
    for group in groups:
        ahead.append(_submit(processes, build, group))
        if len(ahead) > 2 * processes or ahead[0].done():
            yield _result(ahead.popleft())
    yield from map(_result, ahead)


def build_entries(plan: Plan, group: Sequence[Labeled]) -> list[Entry]:
    """Find the regions of each asset and check them against the project's config."""
    return [_build_entry(plan, asset) for asset in group]


def _build_entry(plan: Plan, asset: Labeled) -> Entry:
    regions = regions_for(
        asset.masks,
        asset_id=asset.asset_id,
        as_=plan.as_,
        max_masks=plan.max_masks,
        max_brush=MAX_BRUSH,
        max_brush_bytes=MAX_BRUSH_BYTES,
    )
    address_regions(plan.controls, regions.result)
    task = _task(plan, asset, regions)
    prediction = _json(task["predictions"][0])
    if len(prediction) > MAX_BYTES:
        regions = _smaller(regions, MAX_BYTES - 10_000)
        task = _task(plan, asset, regions)
        prediction = _json(task["predictions"][0])
    return Entry(
        asset_id=asset.asset_id,
        asset_uid=asset.asset_uid,
        uri=asset.uri,
        task_id=asset.task_id,
        data=_json(task["data"]),
        prediction=prediction,
        mask_count=len(asset.masks),
        ious=regions.ious,
        error="; ".join([*address_faults(asset.address), *faults(plan.controls, task["predictions"][0])]) or None,
    )


def _task(plan: Plan, asset: Labeled, regions: Regions) -> dict[str, Any]:
    task = prediction_task(
        image=asset.address,
        asset_id=asset.asset_uid,
        size_hw=asset.size_hw,
        model_version=plan.model_version,
        regions=regions,
    )
    task["data"][plan.controls.image_field] = task["data"].pop("image")
    return task


def _smaller(regions: Regions, max_bytes: int) -> Regions:
    """The best regions whose JSON takes at most max_bytes. A mask is kept whole or left out."""
    kept: list[dict[str, Any]] = []
    ious = []
    size_bytes = 0
    for n, parts in enumerate(_by_mask(regions.result)):
        size_bytes += len(_json(parts))
        if size_bytes <= max_bytes:
            kept += parts
            ious.append(regions.ious[n])
        else:
            size_bytes -= len(_json(parts))
    left_out = regions.left_out + len(regions.ious) - len(ious)
    return Regions(result=kept, ious=tuple(ious), left_out=left_out)


def _by_mask(result: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Regions mask by mask: the first region of a mask and its further parts."""
    parts: list[dict[str, Any]] = []
    for region in result:
        if parts and "parentID" not in region:
            yield parts
            parts = []
        parts.append(region)
    if parts:
        yield parts


def _json(value: Any) -> bytes:
    return orjson.dumps(value)  # 0.07 ms for a task of fifty masks; json takes 0.6 ms


# Kept until this process ends: with --follow there is a pass every few seconds.
_pool: ProcessPoolExecutor | None = None


def _submit(processes: int, build: partial[list[Entry]], group: Sequence[Labeled]) -> Future[list[Entry]]:
    global _pool
    if _pool is None:
        # Spawned, not forked: a fork would copy this process's threads and open connections only in part.
        context = multiprocessing.get_context("spawn")
        _pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_process)
    with _killed_as_error():
        return _pool.submit(build, group)


def _result(future: Future[list[Entry]]) -> list[Entry]:
    with _killed_as_error():
        return future.result()


@contextmanager
def _killed_as_error() -> Iterator[None]:
    """A pool with a dead process says so at its results, and also at what is submitted later."""
    global _pool
    try:
        yield
    except BrokenProcessPool as error:
        _pool = None
        raise LabelStudioError(
            "a process that finds regions was killed (out of memory?): publish again goes on"
        ) from error


def _start_process() -> None:
    """Let a server on the same machine use the processor first, and end when the parent process is killed."""
    os.nice(10)
    keep_freed_memory()

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()  # a killed parent does not close the pipe that this process waits for
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
