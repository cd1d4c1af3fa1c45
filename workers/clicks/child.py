"""The decoder child: `python -P -m workers.clicks.child`. Reads requests from stdin, writes answers to stdout.

One line is one message (`messages`). It ends at the end of its input. stdout belongs to the protocol alone: what a
library prints goes to stderr. It works on one thread; for more cores, start more children.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from typing import BinaryIO

import cv2
import torch

from db.settings import settings
from workers.clicks.decoding import Decoding
from workers.clicks.messages import (
    Answer,
    ClickAnswer,
    LoadAnswer,
    LoadRequest,
    MessageError,
    Ready,
    read_request,
    to_line,
)
from workers.embeddings.store import open_store
from workers.errors import redact

# glibc's malloc.h. 32 MiB is the largest threshold that it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_BYTES, _TRIM_BYTES = 32 * 1024 * 1024, 1024 * 1024 * 1024
MOST_LINE_BYTES = 64 * 1024 * 1024  # a request holds a mask's run lengths at most

log = logging.getLogger(__name__)


def main() -> int:
    """Answer requests until stdin ends. 2 when MASKFLEET_EMBEDDINGS is not set."""
    answers = _take_stdout()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    keep_freed_memory()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    store = open_store(settings())
    if store is None:
        log.error("MASKFLEET_EMBEDDINGS is not set: it names the folder or s3://bucket/prefix of kept embeddings")
        return 2
    serve(Decoding(store), sys.stdin.buffer, answers)
    return 0


def keep_freed_memory() -> None:
    """Let glibc keep the buffers of a click for the next one, where this is glibc.

    By default it gives back every buffer of a megabyte or more. Then a click with vit_b's decoder faults in 6,500 pages
    anew and takes 87 CPU ms instead of 49 (EPYC, 2 cores, load 8, November 2026).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def serve(decoding: Decoding, requests: BinaryIO, answers: BinaryIO) -> None:
    """Write Ready, then one answer for each line of requests."""
    _write(answers, Ready())
    while line := requests.readline(MOST_LINE_BYTES):
        if line.strip():
            _write(answers, _answer(decoding, line))


def _answer(decoding: Decoding, line: bytes) -> Answer:
    try:
        request = read_request(line)
    except MessageError as error:
        return ClickAnswer(n=error.n, error=redact(str(error)))
    if not isinstance(request, LoadRequest):
        return decoding.answer(request)
    try:
        decoding.load(request.load)
    except Exception as error:  # noqa: BLE001  other models may load
        return LoadAnswer(loaded=request.load, error=redact(f"{type(error).__name__}: {error}"))
    return LoadAnswer(loaded=request.load)


def _write(answers: BinaryIO, answer: Answer) -> None:
    answers.write(to_line(answer))
    answers.flush()


def _take_stdout() -> BinaryIO:
    """The real stdout. From now on, file descriptor 1 is stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    sys.exit(main())
