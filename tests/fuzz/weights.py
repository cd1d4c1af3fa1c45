"""Files of models: ONNX graphs and checkpoints. Vendors' runtimes are not called: ours reads the headers."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from tests.fuzz.target import Target
from tests.onnx_detectors import write_colour_detector
from workers.detectors.kinds import DetectorError
from workers.detectors.onnx_file import external_files, onnx_metadata
from workers.detectors.onnx_names import onnx_classes
from workers.models.registry import find_model
from workers.models.sam import load_sam
from workers.models.spec import WeightsError


def _read_onnx(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        path.write_bytes(data)
        onnx_metadata(path)
        external_files(path)
        onnx_classes(path)


@cache
def _onnx_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_colour_detector(Path(folder) / "d.onnx", metadata="{0: 'red', 1: 'green', 2: 'blue'}")
        return [path.read_bytes()]


def _read_checkpoint(data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"weights{suffix}"
        path.write_bytes(data)
        known = find_model("sam_vit_b")
        spec = dataclasses.replace(known, weights_file=str(path), size_bytes=len(data))
        load_sam(spec, _no_architecture, "cpu")


def _no_architecture() -> torch.nn.Module:
    """Small, so that what is read decides what happens."""
    return torch.nn.Linear(3, 2)


def _tensors() -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(2, 3), "bias": torch.ones(2), "extra": torch.arange(4, dtype=torch.int64)}


@cache
def _pickled() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(_tensors(), Path(folder) / "w.pth")
        return (Path(folder) / "w.pth").read_bytes()


TARGETS = [
    Target(name="ONNX files", read=_read_onnx, allowed=(DetectorError,), seeds=_onnx_seeds),
    Target(
        name="safetensors files",
        read=lambda data: _read_checkpoint(data, ".safetensors"),
        allowed=(WeightsError,),
        seeds=lambda: [save(_tensors())],
        megabytes=6_000,
    ),
    Target(
        name="checkpoints of torch",
        read=lambda data: _read_checkpoint(data, ".pth"),
        allowed=(WeightsError,),
        seeds=lambda: [_pickled()],
        megabytes=6_000,
    ),
]
