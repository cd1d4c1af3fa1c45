"""The door to onnxruntime: graphs opened on the CPU, or on a CUDA device where onnxruntime has one."""

from __future__ import annotations

from typing import Any


def open_session(graph: bytes | str, device: str, *, threads: int = 0) -> Any:
    """An InferenceSession of a graph's bytes or of the file at a path. threads: on the CPU; 0 leaves it to onnxruntime.

    Raises onnxruntime's errors, which have no common class but Exception.
    """
    import onnxruntime  # here: who asks for a session has said before what to install

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}))
    return onnxruntime.InferenceSession(graph, options, providers=providers)
