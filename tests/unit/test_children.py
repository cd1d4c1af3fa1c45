"""The decoder children as the service holds them: their answers, their deaths, their waiting."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.assist.children import Children
from tests.waiting import wait_for
from workers.clicks.messages import ClickAnswer, ClickRequest
from workers.embeddings.address import EmbeddingFormat, EmbeddingOf
from workers.embeddings.codec import encode
from workers.embeddings.store import EmbeddingStore
from workers.models.files import weights_sha256
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.prompts import Prompt
from workers.storage.objects import open_objects
from workers.training.scenes import draw_scene

pytestmark = pytest.mark.slow

SIZE_HW = (240, 320)
CHILD = ("-P", "-m", "workers.clicks.child")
# Says that it is up, then answers nothing.
SILENT = ("-c", "import sys; print('{\"ready\": true}', flush=True); sys.stdin.read()")
OF = EmbeddingOf(
    model="sam_nano",
    weights_sha256=weights_sha256(find_model("sam_nano")),
    fast=False,
    format=EmbeddingFormat.FP16,
    source="s",
    key="k",
    etag="e",
)


@contextmanager
def children(command: tuple[str, ...], count: int, *, seconds: float = 60) -> Iterator[Children]:
    started = Children(command, count, seconds=seconds, models=lambda: ["sam_nano"] if command is CHILD else [])
    try:
        wait_for(lambda: started.ready() == count, "the children")
        yield started
    finally:
        started.close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddingStore:
    """A store with the embedding OF."""
    monkeypatch.setenv("MASKFLEET_EMBEDDINGS", str(tmp_path / "kept"))
    made = EmbeddingStore(open_objects(str(tmp_path / "kept")))
    (embedding,) = load_model(find_model("sam_nano"), "cpu").embed([draw_scene(91_000_000_000_000, SIZE_HW).image])
    made.write(OF.address, encode(embedding, OF))
    return made


def request(n: int) -> ClickRequest:
    return ClickRequest(n=n, stamp=OF.stamp, size_hw=SIZE_HW, prompt=Prompt(points=((160, 120, 1),)))


def processes(command: tuple[str, ...]) -> list[psutil.Process]:
    mine = psutil.Process().children()
    return [child for child in mine if words_of(child)[1 : 1 + len(command)] == list(command)]


def words_of(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):  # of another test, and it has just ended
        return process.cmdline()
    return []


def test_a_child_that_is_killed_costs_one_click_and_comes_back(store: EmbeddingStore) -> None:
    with children(CHILD, 1) as started:
        first = started.ask(request(1), route=0)
        assert isinstance(first, ClickAnswer)
        assert first.mask is not None
        (process,) = processes(CHILD)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)

        assert started.ask(request(2), route=0) is None
        wait_for(lambda: started.ready() == 1, "another child")
        again = started.ask(request(3), route=0)
    assert again is not None
    assert again.mask == first.mask


def test_a_child_that_cannot_be_started_now_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    start, tries = subprocess.Popen, []

    def start_or_fail(*given: Any, **named: Any) -> Any:
        tries.append(given)
        if len(tries) == 1:
            raise BlockingIOError(errno.EAGAIN, "no room for a process")
        return start(*given, **named)

    monkeypatch.setattr("orchestrator.assist.children.subprocess.Popen", start_or_fail)
    with children(SILENT, 1) as started:
        assert started.ready() == 1
    assert len(tries) == 2


def test_a_service_that_ends_while_a_child_is_started_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start, begun, go_on = subprocess.Popen, threading.Event(), threading.Event()

    def start_slowly(*given: Any, **named: Any) -> Any:
        begun.set()
        go_on.wait(30)
        return start(*given, **named)

    monkeypatch.setattr("orchestrator.assist.children.subprocess.Popen", start_slowly)
    started = Children(("-c", "import time; time.sleep(3600)"), 1, seconds=3600, models=list)
    begun.wait(30)
    threading.Timer(0.2, go_on.set).start()

    started.close()  # it would wait for an hour

    assert processes(("-c", "import time; time.sleep(3600)")) == []


def test_all_children_end_with_the_service(store: EmbeddingStore) -> None:
    with children(CHILD, 2):
        assert len(processes(CHILD)) == 2
    assert processes(CHILD) == []


def test_a_click_whose_child_is_silent_is_given_up_and_so_is_the_next(store: EmbeddingStore) -> None:
    with children(SILENT, 1, seconds=0.2) as started:
        assert started.ask(request(1), route=0) is None
        assert started.ask(request(2), route=0) is None


def test_without_children_there_is_no_answer() -> None:
    assert Children((sys.executable,), 0, seconds=1, models=list).ask(request(1), route=5) is None
