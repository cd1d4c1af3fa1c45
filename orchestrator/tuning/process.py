"""The process that trains: started, listened to, stopped. The command itself never loads torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workers.tuning.plan import TuneError

Said = Mapping[str, Any]
_STOPPED = 130
_STOP_SECONDS = 120.0  # a step of vit_h on a busy CPU, and the checkpoint after it


class TuneStopped(Exception):
    """The person stopped the training. Its state is stored."""


def train_and_judge(folder: Path, *, seconds: float, device: str, listen: Callable[[Said], None]) -> None:
    """Run the tuning that the folder's plan asks, and hand each line of progress to `listen`.

    Raises TuneError with the process's own reason, TuneStopped after Ctrl-C.
    """
    module = "workers.tuning.tune"
    command = [sys.executable, "-P", "-m", module, str(folder), "--seconds", str(seconds), "--device", device]
    # Threads that wait sleep. Else they spin, and on a machine that others use too a step takes ten times as long.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    # Ctrl-C waits until both processes hear it. The new one would end with a trace while it imports torch.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        with process:
            code, error = _follow(process, listen, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if code == _STOPPED:
        raise TuneStopped
    if code:
        raise TuneError(error or f"the process that trains ended with {code}; its last lines are above")


def _follow(
    process: subprocess.Popen[str], listen: Callable[[Said], None], unblocked: set[signal.Signals | int]
) -> tuple[int, str | None]:
    """The exit code, and the last error that the process said."""
    error = None
    assert process.stdout is not None
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        for line in process.stdout:
            said = _read(line)
            error = said.get("error", error)
            listen(said)
        return process.wait(), error
    except KeyboardInterrupt:  # the process has got it too, unless a program sent it to this one alone
        _stop(process)
        raise TuneStopped from None
    finally:
        if process.poll() is None:
            _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    """Close its stdin, which ends it after its current step with a checkpoint. Kill it when it does not end."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _read(line: str) -> Said:
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
