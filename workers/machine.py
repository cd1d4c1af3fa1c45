"""What of this machine workers may use: devices, cores, memory. A container's limits count (cgroup v2)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MOST_CPU_WORKERS = 8  # on machines with more cores each has several threads
# A worker's memory beside its weights, at the peak. Measured on photos of 0.8 MP: sam_nano 1.2 GB; vit_b 12 GB, mostly
# SAM's decoder for 64 points at once, which all models of SAM's size have.
_SMALL_WEIGHTS_BYTES = 10_000_000
_SMALL_WORKING_BYTES, _WORKING_BYTES = 1_500_000_000, 12_000_000_000
_LARGEST_WEIGHTS_BYTES = 2_600_000_000


PINNED_VARIABLE = "CUDA_VISIBLE_DEVICES"  # CUDA's own; empty for a worker on the CPU


class DeviceError(ValueError):
    """The requested devices do not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """name: shown by Flower before the @host, such as gpu0. cuda_id: index, UUID or MIG UUID; empty for the CPU.

    threads: how many cores the computations of a worker on the CPU take; 0 for all.
    """

    name: str
    cuda_id: str = ""
    threads: int = 0


def pinned_device() -> str:
    """torch's name of the device that `maskfleet worker` gave to this process. Loads no torch.

    A CUDA device that torch cannot use fails when a model is loaded. It is not replaced by the CPU, a hundred times
    slower, in silence.
    """
    return "cuda:0" if os.environ.get(PINNED_VARIABLE) else "cpu"


def find_devices(wanted: str) -> list[Device]:
    """The devices of `--devices`: `all` (every CUDA device, or the CPU), `auto`, `cpu`, `0,1`, `cpu,cpu`.

    Workers on the CPU share its cores.
    Raises DeviceError, which names the devices that exist.
    """
    present = _cuda_ids()
    if wanted == "auto":
        wanted = auto_devices(_LARGEST_WEIGHTS_BYTES)
    if wanted == "all":
        return [Device(name=f"gpu{n}", cuda_id=i) for n, i in enumerate(present)] or [Device(name="cpu0")]
    devices: list[Device] = []
    for word in wanted.split(","):
        if word.strip() == "cpu":
            devices.append(Device(name=f"cpu{sum(not d.cuda_id for d in devices)}"))
        elif word.strip().isdecimal() and int(word) < len(present):
            devices.append(Device(name=f"gpu{int(word)}", cuda_id=present[int(word)]))
        else:
            raise DeviceError(
                f"device {word!r}: expected `all`, `cpu` or numbers below {len(present)} (CUDA devices here)"
            )
    if len({d.name for d in devices}) < len(devices):
        raise DeviceError(f"--devices {wanted}: a CUDA device is named twice")
    on_cpu = sum(not device.cuda_id for device in devices)
    threads = max(1, usable_cores() // on_cpu) if on_cpu > 1 else 0
    return [device if device.cuda_id else replace(device, threads=threads) for device in devices]


def auto_devices(weights_bytes: int) -> str:
    """What `--devices auto` means here for a model of this size: every CUDA device, or as many CPU workers as pay.

    On the CPU a worker a core is faster than one worker with a thread a core: what surrounds the matrix products runs
    in one thread (tests/benchmarks/README.md). Each must have the memory for its own copy of the model.
    """
    if _cuda_ids():
        return "all"
    free = free_memory_bytes()
    working = _SMALL_WORKING_BYTES if weights_bytes < _SMALL_WEIGHTS_BYTES else _WORKING_BYTES
    fit = _MOST_CPU_WORKERS if free is None else free // (working + 2 * weights_bytes)
    return ",".join(["cpu"] * max(1, min(usable_cores(), _MOST_CPU_WORKERS, fit)))


def _cuda_ids() -> list[str]:
    """UUIDs of the CUDA devices that this process may use. A card cut into MIG slices gives the slices' UUIDs."""
    visible = os.environ.get(PINNED_VARIABLE)
    if visible is None:
        return [cuda_id for _, cuda_ids in _cards() for cuda_id in cuda_ids]
    parts = [part for part in visible.split(",") if part not in ("", "-1")]
    if not any(part.isdecimal() for part in parts):
        return parts
    # Numbers do not tell cards apart: Slurm's ConstrainDevices counts each job's own cards from 0. `device_lock` must.
    with suppress(DeviceError):
        cards = _cards()
        if _counts_as_cuda(cards):
            return [cards[int(part)][1][0] if part.isdecimal() and int(part) < len(cards) else part for part in parts]
    return parts


def _counts_as_cuda(cards: Sequence[tuple[str, Sequence[str]]]) -> bool:
    """Whether nvidia-smi's numbers are CUDA's. CUDA puts the fastest card first, and counts otherwise with MIG."""
    in_order = len({name for name, _ in cards}) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    return in_order and all(len(cuda_ids) == 1 and cuda_ids[0].startswith("GPU-") for _, cuda_ids in cards)


def _cards() -> list[tuple[str, list[str]]]:
    """Of each card that nvidia-smi lists, its name, and its UUID or those of its MIG slices. Raises DeviceError."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError) as error:
        raise DeviceError(f"nvidia-smi is installed but does not answer: {error}") from error
    return [
        (
            card.partition(" (UUID")[0].partition(": ")[2],
            re.findall(r"UUID: (MIG-[^)\s]+)", card) or re.findall(r"UUID: (GPU-[^)\s]+)", card),
        )
        for card in re.split(r"(?m)^GPU ", listed)[1:]
    ]


def usable_cores() -> int:
    """The cores that this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        cores = min(cores, round(int(quota) / int(period)))  # ValueError: "max", no limit
    return max(1, cores)


def free_memory_bytes() -> int | None:
    """The memory that new processes may take. None where the system does not say, as on macOS."""
    free = None
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):
        limit, used = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        left = max(0, int(limit) - int(used) + _cache_bytes())  # ValueError: "max", no limit
        free = left if free is None else min(free, left)
    return free


def _cache_bytes() -> int:
    """What the container's use counts of files that were read, and the kernel gives back before anything is killed."""
    with suppress(OSError, ValueError):
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return 0
