"""Which devices a worker command takes, and how the CPU's cores are shared."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from workers import machine
from workers.machine import Device, DeviceError, auto_devices, find_devices, free_memory_bytes, usable_cores

CARDS = """GPU 0: NVIDIA H100 (UUID: GPU-aaaa)
  MIG 1g.10gb Device 0: (UUID: MIG-bbbb)
GPU 1: NVIDIA H100 (UUID: GPU-cccc)
"""


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A container's folder of limits."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    return tmp_path


def test_each_cuda_device_or_mig_slice_of_nvidia_smi_is_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{CARDS}END\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    gpus = [Device(name="gpu0", cuda_id="MIG-bbbb"), Device(name="gpu1", cuda_id="GPU-cccc")]
    assert find_devices("all") == find_devices("auto") == gpus
    assert find_devices("1,cpu") == [gpus[1], Device(name="cpu0")]
    with pytest.raises(DeviceError, match="named twice"):
        find_devices("1,1")


def test_workers_on_the_cpu_share_its_cores(limits: Path) -> None:
    assert find_devices("all") == [Device(name="cpu0")]
    shared = find_devices("cpu,cpu")
    assert [device.name for device in shared] == ["cpu0", "cpu1"]
    assert {device.threads for device in shared} == {max(1, usable_cores() // 2)}
    with pytest.raises(DeviceError, match="numbers below 0"):
        find_devices("0")


def test_auto_takes_a_worker_a_core_unless_memory_or_the_container_allows_fewer(limits: Path) -> None:
    assert auto_devices(0).count("cpu") == min(usable_cores(), 8)
    (limits / "cpu.max").write_text("100000 100000\n")
    assert usable_cores() == 1
    assert auto_devices(0) == "cpu"
    (limits / "cpu.max").write_text("max 100000\n")
    (limits / "memory.max").write_text("5000000000\n")
    (limits / "memory.current").write_text("1000000000\n")
    free = free_memory_bytes()
    assert free is not None
    assert free <= 4_000_000_000
    assert auto_devices(10**12) == "cpu"
