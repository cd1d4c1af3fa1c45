"""The decoder processes. Each reads requests and writes answers, one JSON line each, and ends when its input ends.

A child that dies or does not answer in time costs one click: that click is answered from the stored masks.
"""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from workers.clicks.messages import ClickAnswer, ClickRequest, MessageError, read_answer, to_line

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_MAX_LINE_BYTES = 64_000_000

log = logging.getLogger(__name__)


class Children:
    """A fixed number of child processes of one command. An asset's clicks always go to the same child, for its cache.

    Thread-safe. `ask` returns None when the child is busy, starting or dead.
    """

    def __init__(self, command: Sequence[str], count: int, *, seconds: float) -> None:
        """seconds: how long one request may take, with its wait for the child's earlier requests."""
        self._children = [_Child(command, n, seconds) for n in range(count)]

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

    def __init__(self, command: Sequence[str], number: int, seconds: float) -> None:
        self._command = command
        self._number = number
        self._seconds = seconds
        self._busy = threading.Lock()  # held while a request is with the child
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._closed = threading.Event()
        self._died = threading.Event()
        self.is_ready = False
        threading.Thread(target=self._keep_up, name=f"decoder-{number}", daemon=True).start()

    def ask(self, request: ClickRequest) -> ClickAnswer | None:
        give_up_at = time.monotonic() + self._seconds
        if not self.is_ready or not self._busy.acquire(timeout=self._seconds):
            return None
        try:
            process = self._process
            if process is None or not self.is_ready:
                return None
            return self._exchange(process, request, give_up_at)
        except (OSError, ValueError) as error:
            self._kill(f"{type(error).__name__}: {error}")
            return None
        finally:
            self._busy.release()

    def close(self) -> None:
        self._closed.set()
        self._died.set()
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _exchange(self, process: subprocess.Popen[bytes], request: ClickRequest, give_up_at: float) -> ClickAnswer:
        assert process.stdin is not None
        process.stdin.write(to_line(request))
        process.stdin.flush()
        answer = read_answer(self._read_line(process, give_up_at))
        if not isinstance(answer, ClickAnswer) or answer.n != request.n:
            raise MessageError("its answer belongs to another request")
        return answer

    def _read_line(self, process: subprocess.Popen[bytes], give_up_at: float) -> bytes:
        """One line of the child's output. Raises TimeoutError, or EOFError when the child has ended."""
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        while b"\n" not in self._unread:
            waiting, _, _ = select.select([descriptor], [], [], max(0.0, give_up_at - time.monotonic()))
            if not waiting:
                raise TimeoutError(f"no answer within {self._seconds:g} s")
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
        log.warning("decoder %d: %s; it is started again", self._number, reason)
        self.is_ready = False
        if self._process is not None:
            self._process.kill()
        self._died.set()

    def _keep_up(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._closed.is_set():
            started = time.monotonic()
            with self._busy:
                self._died.clear()
                self._unread = b""
                self._process = self._start()
            while not self._closed.is_set() and self._process.poll() is None and not self._died.wait(0.2):
                pass
            self.is_ready = False
            self._process.kill()
            self._process.wait()
            pause = (
                _FIRST_PAUSE_SECONDS
                if time.monotonic() - started > _LONGEST_PAUSE_SECONDS
                else min(pause * 2, _LONGEST_PAUSE_SECONDS)
            )
            self._closed.wait(pause)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, *self._command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        threading.Thread(target=self._greet, args=(process,), daemon=True).start()
        return process

    def _greet(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the child's first line. Its libraries take seconds to load."""
        with self._busy:
            if process is not self._process:
                return
            try:
                self._read_line(process, time.monotonic() + 600)
            except (OSError, ValueError) as error:
                self._kill(f"it did not start: {error}")
                return
            self.is_ready = True
