"""An embedding to the bytes of its file, and back.

A file is safetensors: one tensor a level, `level0`, `level1`, …, and for int8 also `scale0`, …. Its metadata hold the
stamp, a format version, and a crc32 of the tensors. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from workers.embeddings.address import EmbeddingError, EmbeddingFault, EmbeddingFormat, EmbeddingOf, Stamp

VERSION = "1"
_MOST_HEADER_BYTES = 64 * 1024
_MOST_LEVELS = 8
_STORED = {"level": (torch.float16, torch.int8), "scale": (torch.float32,)}


def encode(embedding: Any, of: EmbeddingOf) -> bytes:
    """The bytes of an embedding's file.

    embedding: a Tensor (1, C, h, w), or a list of such Tensors, float32 on any device. Raises EmbeddingError
    (unusable) when a value is not finite, or too large for fp16.
    """
    levels = [embedding] if isinstance(embedding, Tensor) else list(embedding)
    tensors: dict[str, Tensor] = {}
    for number, level in enumerate(levels):
        stored = _to_int8(level) if of.format is EmbeddingFormat.INT8 else {"level": level.half()}
        if not all(bool(torch.isfinite(part).all()) for part in stored.values()) or not bool(level.isfinite().all()):
            raise EmbeddingError(EmbeddingFault.UNUSABLE, f"{of.key}: its embedding does not fit into {of.format}")
        tensors |= {f"{name}{number}": part.cpu().contiguous() for name, part in stored.items()}
    stamp = of.stamp
    return save(
        tensors,
        {
            "version": VERSION,
            "address": stamp.address,
            "model": stamp.model,
            "weights_sha256": stamp.weights_sha256,
            "etag": stamp.etag,
            "form": "tensor" if isinstance(embedding, Tensor) else "list",
            "crc32": f"{_crc32(tensors):08x}",
        },
    )


def decode(content: bytes, expected: Stamp) -> Any:
    """The embedding of a file, float32 on the CPU, in the form that `encode` got.

    Raises EmbeddingError: damaged, or foreign when its stamp is not the expected one.
    """
    metadata = _metadata(content, expected)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise EmbeddingError(EmbeddingFault.DAMAGED, f"{expected.address}: cannot be read ({error})") from error
    if f"{_crc32(tensors):08x}" != metadata.get("crc32"):
        raise EmbeddingError(EmbeddingFault.DAMAGED, f"{expected.address}: its bytes are not those that were written")
    levels = [_to_float(tensors, number, expected) for number in range(_level_count(tensors, expected))]
    return levels[0] if metadata.get("form") == "tensor" else levels


def to_device(embedding: Any, device: str) -> Any:
    """The embedding that `decode` gave, on this device."""
    return embedding.to(device) if isinstance(embedding, Tensor) else [level.to(device) for level in embedding]


def _to_int8(level: Tensor) -> dict[str, Tensor]:
    """Whole numbers -127..127 and a scale for each channel: (1, C, 1, 1). A channel of zeros has scale 1."""
    scale = level.float().abs().amax(dim=(2, 3), keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return {"level": (level / scale).round().to(torch.int8), "scale": scale}


def _to_float(tensors: dict[str, Tensor], number: int, expected: Stamp) -> Tensor:
    level, scale = tensors[f"level{number}"], tensors.get(f"scale{number}")
    is_whole = level.dtype == torch.int8
    if level.ndim != 4 or is_whole != (scale is not None):
        raise _foreign(expected, f"level {number} has shape {tuple(level.shape)} and dtype {level.dtype}")
    if scale is None:
        return level.float()
    if scale.shape != (1, level.shape[1], 1, 1):
        raise _foreign(expected, f"scale {number} has shape {tuple(scale.shape)}")
    return level.float() * scale


def _level_count(tensors: dict[str, Tensor], expected: Stamp) -> int:
    count = sum(name.startswith("level") for name in tensors)
    known = {f"{kind}{number}": dtypes for number in range(count) for kind, dtypes in _STORED.items()}
    if not 1 <= count <= _MOST_LEVELS or any(
        tensor.dtype not in known.get(name, ()) for name, tensor in tensors.items()
    ):
        raise _foreign(expected, f"holds {sorted(tensors)[:_MOST_LEVELS]}")
    return count


def _metadata(content: bytes, expected: Stamp) -> dict[str, str]:
    """The metadata of a safetensors file, whose header is JSON after 8 bytes with its length."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(_MOST_HEADER_BYTES, len(content) - 8):
        raise EmbeddingError(EmbeddingFault.DAMAGED, f"{expected.address}: {len(content)} bytes without a whole header")
    try:
        header = json.loads(content[8 : 8 + length])
        metadata = dict(header["__metadata__"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EmbeddingError(EmbeddingFault.DAMAGED, f"{expected.address}: its header cannot be read") from error
    wanted = {
        "version": VERSION,
        "address": expected.address,
        "model": expected.model,
        "weights_sha256": expected.weights_sha256,
        "etag": expected.etag,
    }
    for name, value in wanted.items():
        if metadata.get(name) != value:
            raise _foreign(expected, f"its {name} is {str(metadata.get(name))[:80]!r}, expected {value!r}")
    return metadata


def _foreign(expected: Stamp, found: str) -> EmbeddingError:
    return EmbeddingError(EmbeddingFault.FOREIGN, f"{expected.address}: {found}")


def _crc32(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(memoryview(tensors[name].numpy().reshape(-1).view("uint8")), crc)  # type: ignore[arg-type]  # stubs lack it
    return crc
