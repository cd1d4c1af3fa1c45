"""Opens ONNX graphs on the CPU, or on a CUDA device where onnxruntime has one. Only this module imports onnxruntime."""

from __future__ import annotations

from typing import Any


def open_session(graph: bytes | str, device: str, *, threads: int = 0) -> Any:
    """An InferenceSession of a graph's bytes or of the file at a path. threads: on the CPU; 0: onnxruntime chooses.

    Raises onnxruntime's errors. Exception is their only common class.
    """
    import onnxruntime  # here, because the caller first checks that it is installed

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}))
    return onnxruntime.InferenceSession(graph, options, providers=providers)
