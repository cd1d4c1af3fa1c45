"""How full a device is. Which errors of torch mean that it is full, and which mean that this process has lost it."""

from __future__ import annotations

from enum import StrEnum

import torch


class DeviceFault(StrEnum):
    OUT_OF_MEMORY = "out of memory"  # smaller work may fit
    LOST = "lost"  # after a failed kernel the CUDA context is unusable for the rest of the process


def device_fault(error: BaseException) -> DeviceFault | None:
    """Classify an error that a model raised. Frees the cached device memory when it was full."""
    # torch's allocator says "CUDA out of memory", the driver "CUDA error: out of memory" (when it loads a kernel, for
    # instance), onnxruntime "CUDA failure 2: out of memory". The context stays usable after each.
    full = ("can't allocate memory", "_ALLOC_FAILED", "out of memory", "Failed to allocate memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(mark in str(error) for mark in full):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return DeviceFault.OUT_OF_MEMORY
    lost = ("CUDA error", "CUDA driver error", "CUDA failure", "CUBLAS_", "CUDNN_")
    from_device = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    if from_device and any(mark in str(error) for mark in lost):
        return DeviceFault.LOST
    return None


def free_bytes(device: torch.device) -> int | None:
    """The bytes that this process may still allocate on a CUDA device, torch's own cache included. None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def default_device() -> str:
    """The CUDA device that this process may use, or the CPU."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"
