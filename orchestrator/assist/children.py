"""The decoder processes. Each reads requests and writes answers, one JSON line each, and ends when its input ends.

A child that dies or does not answer in time costs one click: that click is answered from the stored masks.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from workers.clicks.messages import (
    ClickAnswer,
    ClickRequest,
    LoadAnswer,
    LoadRequest,
    MessageError,
    Request,
    read_answer,
    to_line,
)

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_SILENT_SECONDS = 300.0  # a child that says nothing for so long is given up; loading vit_h's weights takes a while
_MAX_LINE_BYTES = 64_000_000

log = logging.getLogger(__name__)


class Children:
    """A fixed number of child processes of one command. An asset's clicks always go to the same child, for its cache.

    Thread-safe. `ask` returns None when the child is busy, starting or dead.
    """

    def __init__(
        self, command: Sequence[str], count: int, *, seconds: float, models: Callable[[], Iterable[str]]
    ) -> None:
        """seconds: the patience of one click, with its wait for earlier clicks. models: to load before any click."""
        self._children = [_Child(command, n, seconds, models) for n in range(count)]

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: ClickRequest, *, route: int) -> ClickAnswer | None:
        """Send a request to the child of this route, and return its answer."""
        if not self._children:
            return None
        return self._children[route % len(self._children)].ask(request)

    def ready(self) -> int:
        """How many children are up."""
        return sum(child.is_ready for child in self._children)

    def close(self) -> None:
        for child in self._children:
            child.close()


class _Child:
    """One process. A thread starts it, and starts it again, with growing pauses, when it has ended."""

    def __init__(
        self, command: Sequence[str], number: int, seconds: float, models: Callable[[], Iterable[str]]
    ) -> None:
        self._command = command
        self._number = number
        self._seconds = seconds
        self._models = models
        self._busy = threading.Lock()  # held while a request is with the child
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._closed = threading.Event()
        self._died = threading.Event()
        self.is_ready = False
        self._thread = threading.Thread(target=self._keep_up, name=f"decoder-{number}", daemon=True)
        self._thread.start()

    def ask(self, request: ClickRequest) -> ClickAnswer | None:
        """The child's answer. None when there is none within the patience of a click.

        A late answer is read and dropped, before the child gets another request: it may be loading a model.
        """
        give_up_at = time.monotonic() + self._seconds
        if not self.is_ready or not self._busy.acquire(timeout=self._seconds):
            return None
        answered: queue.SimpleQueue[ClickAnswer | None] = queue.SimpleQueue()
        threading.Thread(target=self._exchange, args=(request, answered), daemon=True).start()
        try:
            return answered.get(timeout=max(0.0, give_up_at - time.monotonic()))
        except queue.Empty:
            return None

    def close(self) -> None:
        self._closed.set()
        self._died.set()
        process = self._process
        if process is not None:
            process.kill()
        self._thread.join()

    def _exchange(self, request: ClickRequest, answered: queue.SimpleQueue[ClickAnswer | None]) -> None:
        """Send one request and wait for its answer. The caller acquired `_busy`; it is released here."""
        answer = None
        try:
            process = self._process
            if process is not None and self.is_ready:
                self._send(process, request)
                answer = self._read_answer(process, request.n)
        except (OSError, ValueError) as error:
            self._kill(f"{type(error).__name__}: {error}")
        finally:
            self._busy.release()
            answered.put(answer)

    def _send(self, process: subprocess.Popen[bytes], request: Request) -> None:
        assert process.stdin is not None
        process.stdin.write(to_line(request))
        process.stdin.flush()

    def _read_answer(self, process: subprocess.Popen[bytes], n: int) -> ClickAnswer:
        answer = read_answer(self._read_line(process))
        if not isinstance(answer, ClickAnswer) or answer.n != n:
            raise MessageError("its answer belongs to another request")
        return answer

    def _read_line(self, process: subprocess.Popen[bytes]) -> bytes:
        """One line of the child's output. Raises TimeoutError, or another OSError when the child has ended."""
        assert process.stdout is not None
        descriptor, give_up_at = process.stdout.fileno(), time.monotonic() + _SILENT_SECONDS
        while b"\n" not in self._unread:
            waiting, _, _ = select.select([descriptor], [], [], max(0.0, give_up_at - time.monotonic()))
            if not waiting:
                raise TimeoutError(f"no answer within {_SILENT_SECONDS:g} s")
            read = os.read(descriptor, 1 << 20)
            if not read:
                raise OSError("it has ended")
            self._unread += read
            if len(self._unread) > _MAX_LINE_BYTES:
                raise ValueError("its answer is too long")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _kill(self, reason: str) -> None:
        """End a child that no longer keeps to the protocol. `_keep_up` starts another."""
        if not self._closed.is_set():
            log.warning("decoder %d: %s; it is started again", self._number, reason)
        self.is_ready = False
        if self._process is not None:
            self._process.kill()
        self._died.set()

    def _keep_up(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._closed.is_set():
            started = time.monotonic()
            self._died.clear()
            self._unread = b""
            process = self._start()
            if process is not None:
                self._process = process
                if self._closed.is_set():  # `close` killed its predecessor
                    process.kill()
                self._greet(process)
                while not self._died.wait(0.2) and process.poll() is None:
                    pass
                self._end(process)
            is_young = time.monotonic() - started < _LONGEST_PAUSE_SECONDS
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS) if is_young else _FIRST_PAUSE_SECONDS
            self._closed.wait(pause)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self.is_ready = False
        process.kill()
        process.wait()
        with self._busy:  # a request that is with the child ends first
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what the child has not read cannot be written any more
                    if pipe is not None:
                        pipe.close()

    def _start(self) -> subprocess.Popen[bytes] | None:
        """The process. None when the machine has no room for one now: it is tried again after the pause."""
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        try:
            return subprocess.Popen(
                [sys.executable, *self._command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        except OSError as error:
            log.warning("decoder %d cannot be started now: %s", self._number, error)
            return None

    def _greet(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the child is up, then let it load its models. Its libraries take seconds to load."""
        with self._busy:
            try:
                read_answer(self._read_line(process))
                for model in self._models():
                    self._send(process, LoadRequest(load=model))
                    loaded = read_answer(self._read_line(process))
                    if isinstance(loaded, LoadAnswer) and loaded.error is not None:
                        log.info("decoder %d: only stored masks answer for %s: %s", self._number, model, loaded.error)
            except (OSError, ValueError) as error:
                self._kill(f"it did not start: {error}")
                return
            self.is_ready = True
