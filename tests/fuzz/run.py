"""Fuzz the readers of bytes from outside. Each target runs in a process of its own, with limits.

    make fuzz MINUTES=30                                     all targets in turn, with fresh seeds
    .venv/bin/python -m tests.fuzz.run --only images --seed 7

What is found is written to out/fuzz: the input, and what happened. Exit status 1 when something was found.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed

from tests.fuzz import images, label_studio, listings, prompts
from tests.fuzz.target import Target

NAMES = [target.name for part in (images, label_studio, listings, prompts) for target in part.TARGETS]
NAMES += ["ONNX files", "safetensors files", "checkpoints of torch"]  # their module loads torch, so only when asked
FINDS = Path("out") / "fuzz"
_WAITS = 20  # times its CPU seconds: how long a reader may take when it waits, or others compute


class TooSlow(BaseException):
    """Not an Exception, so that no reader takes it for its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", choices=NAMES, help="this target alone")
    parser.add_argument("--examples", type=int, default=400, help="inputs of a target's turn")
    parser.add_argument("--seed", type=int, help="one turn of each target with this seed, in place of minutes")
    parser.add_argument("--in-child", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_child:
        print(json.dumps(run_target(target_of(args.only), args.examples, args.seed, Path(args.in_child))))
        return
    sys.exit(1 if campaign([args.only] if args.only else NAMES, args.minutes, args.examples, args.seed) else 0)


def campaign(names: list[str], minutes: float, examples: int, seed: int | None) -> int:
    """Give each target its turn until the time is over. Returns the number of finds."""
    began, runs, finds = time.monotonic(), dict.fromkeys(names, 0), 0
    for turn in itertools.count():
        for name in names:
            number = random.randrange(2**32) if seed is None else seed
            done, said = in_child(name, examples, number)
            runs[name] += done
            if said:
                finds += 1
                print(f"FIND {name}, seed {number}: {said}", flush=True)
            if seed is None and time.monotonic() - began > 60 * minutes:
                break
        if seed is not None or time.monotonic() - began > 60 * minutes:
            break
        print(f"turn {turn + 1}: {sum(runs.values()):,} inputs, {finds} finds", file=sys.stderr, flush=True)
    for name, count in runs.items():
        print(f"{name:30} {count:10,} inputs")
    print(f"{(time.monotonic() - began) / 3600:.2f} hours, {sum(runs.values()):,} inputs, {finds} finds")
    return finds


def in_child(name: str, examples: int, seed: int) -> tuple[int, str]:
    """One turn in a process of its own. Returns how many inputs it read, and what was found, or nothing."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--only", name, "--examples", str(examples)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--seed", str(seed), "--in-child", folder], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            report = json.loads(done.stdout.splitlines()[-1])
            runs, said = int(report["runs"]), str(report["find"])
        else:
            runs, said = 0, f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
        if said:
            keep(name, seed, said, Path(folder) / "input")
    return runs, said


def keep(name: str, seed: int, said: str, last_input: Path) -> None:
    FINDS.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace(' ', '-')}-{seed}"
    (FINDS / f"{stem}.txt").write_text(said)
    if last_input.exists():
        (FINDS / f"{stem}.bin").write_bytes(last_input.read_bytes())


def target_of(name: str) -> Target:
    targets = {target.name: target for part in (images, label_studio, listings, prompts) for target in part.TARGETS}
    if name in targets:
        return targets[name]
    from tests.fuzz import weights  # it loads torch

    return next(target for target in weights.TARGETS if target.name == name)


def run_target(target: Target, examples: int, seed: int, folder: Path) -> dict[str, object]:
    """Read inputs until one fails. The last one is in folder/input, also when this process is killed by it."""
    faulthandler.enable()
    limit = used_bytes() + target.megabytes * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for limit_reached in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(limit_reached, _too_slow)
    runs = 0

    @with_seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # no shrinking: a slow input would be read a hundred times
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs())
    def read_each(data: bytes) -> None:
        nonlocal runs
        runs += 1
        (folder / "input").write_bytes(data)
        read(target, data)

    try:
        read_each()
    except BaseException as error:  # whatever it is, it is a find
        return {"runs": runs, "find": "".join(traceback.format_exception(error))[-3000:]}
    return {"runs": runs, "find": ""}


def read(target: Target, data: bytes) -> None:
    """Read one input; errors that the target allows are as good as an answer."""
    signal.setitimer(signal.ITIMER_PROF, target.seconds)  # of the CPU, so that a busy machine finds nothing
    signal.setitimer(signal.ITIMER_REAL, _WAITS * target.seconds)  # for what waits
    try:
        target.read(data)
    except target.allowed:
        pass
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def used_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow("longer than the target allows")


if __name__ == "__main__":
    main()
