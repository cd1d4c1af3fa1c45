"""Which devices a worker command takes, and how the CPU's cores are shared."""

from __future__ import annotations

import stat
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from workers import machine
from workers.machine import Device, DeviceError, auto_devices, find_devices, free_memory_bytes, usable_cores
from workers.running.device_lock import DeviceHeld, hold_device

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


def list_cards(monkeypatch: pytest.MonkeyPatch, folder: Path, listed: str) -> None:
    """Put an nvidia-smi that lists these cards into the path."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{listed}END\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_each_cuda_device_or_mig_slice_of_nvidia_smi_is_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    list_cards(monkeypatch, tmp_path, CARDS)

    gpus = [Device(name="gpu0", cuda_id="MIG-bbbb"), Device(name="gpu1", cuda_id="GPU-cccc")]
    assert find_devices("all") == find_devices("auto") == gpus
    assert find_devices("1,cpu") == [gpus[1], Device(name="cpu0")]
    with pytest.raises(DeviceError, match="named twice"):
        find_devices("1,1")


def test_two_jobs_whose_own_cards_are_both_number_0_hold_different_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with ExitStack() as held:
        for uuid in ("GPU-aaaa", "GPU-bbbb"):
            list_cards(monkeypatch, tmp_path, f"GPU 0: NVIDIA H100 (UUID: {uuid})\n")
            [device] = find_devices("all")
            assert device == Device(name="gpu0", cuda_id=uuid)
            held.enter_context(hold_device(device.cuda_id))
        with pytest.raises(DeviceHeld, match="GPU-bbbb is held"):
            held.enter_context(hold_device(device.cuda_id))


@pytest.mark.parametrize("listed", ["", CARDS])
def test_numbers_of_cards_stay_where_nvidia_smi_lists_others_or_mig_slices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listed: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    list_cards(monkeypatch, tmp_path, listed)
    assert [device.cuda_id for device in find_devices("all")] == ["0", "1"]


@pytest.mark.parametrize(("order", "found"), [("", "1"), ("PCI_BUS_ID", "GPU-bbbb")])
def test_numbers_of_different_cards_are_those_of_cuda_which_puts_the_fastest_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, order: str, found: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    list_cards(monkeypatch, tmp_path, "GPU 0: Tesla T4 (UUID: GPU-aaaa)\nGPU 1: NVIDIA H100 (UUID: GPU-bbbb)\n")
    assert [device.cuda_id for device in find_devices("all")] == [found]


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


def test_files_that_were_read_take_no_memory_from_workers(limits: Path) -> None:
    (limits / "memory.max").write_text("5000000\n")
    (limits / "memory.current").write_text("4900000\n")
    assert free_memory_bytes() == 100_000
    (limits / "memory.stat").write_text("anon 900000\nactive_file 1000000\ninactive_file 3000000\n")
    assert free_memory_bytes() == 3_100_000
