"""The messages between the assist service and a decoder child: JSON, one object a line. Never loads torch.

The service sends `ClickRequest` and `LoadRequest`. The child sends one `Ready`. Then it sends a `ClickAnswer` or
`LoadAnswer` for each line that it reads, in the same order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from workers.embeddings.address import Stamp, is_address
from workers.prompts import Prompt, PromptError, parse_prompt

_MOST_SIDE_PX = 100_000
_MOST_PIXELS = 1_000_000_000


class MessageError(ValueError):
    """A line is not such a message. n: the number of the request, when it could be read."""

    def __init__(self, message: str, n: int | None = None) -> None:
        super().__init__(message)
        self.n = n


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickRequest:
    """One click to be answered.

    n: the caller's number, repeated in the answer. stamp: the embedding, and what its file must say. size_hw: of the
    upright image. prompt: boxes and points in its pixels. mask_counts: COCO run lengths of a mask to refine. decoder:
    the model whose decoder answers, where it is not the one that encoded.
    """

    n: int
    stamp: Stamp
    size_hw: tuple[int, int]
    prompt: Prompt
    mask_counts: str | None = None
    decoder: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "address": self.stamp.address,
            "model": self.stamp.model,
            "weights_sha256": self.stamp.weights_sha256,
            "etag": self.stamp.etag,
            "size_hw": list(self.size_hw),
            "prompt": self.prompt.as_json(),
            "mask_counts": self.mask_counts,
            "decoder": self.decoder,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ClickRequest:
        """Raises MessageError, also for a prompt that cannot be used."""
        n = _whole(value, "n", None)
        address, model, sha256, etag = (_text(value, name, n) for name in _STAMP)
        if not is_address(address):
            raise MessageError(f"address {address[:80]!r}: expected <weights>/<format>/<content>", n)
        size = value.get("size_hw")
        if not isinstance(size, list) or len(size) != 2 or not all(_is_side(side) for side in size):
            raise MessageError(f"size_hw {str(size)[:80]}: expected [height, width] in pixels", n)
        if size[0] * size[1] > _MOST_PIXELS:
            raise MessageError(f"size_hw {size}: expected at most {_MOST_PIXELS:,} pixels", n)
        counts = value.get("mask_counts")
        if counts is not None and not isinstance(counts, str):
            raise MessageError(f"mask_counts {str(counts)[:80]}: expected COCO run lengths or null", n)
        decoder = value.get("decoder")
        if decoder is not None and not isinstance(decoder, str):
            raise MessageError(f"decoder {str(decoder)[:80]}: expected a model's name or null", n)
        try:
            prompt = parse_prompt(value.get("prompt"))
        except PromptError as error:
            raise MessageError(f"prompt: {error}", n) from error
        stamp = Stamp(address=address, model=model, weights_sha256=sha256, etag=etag)
        return cls(n=n, stamp=stamp, size_hw=(size[0], size[1]), prompt=prompt, mask_counts=counts, decoder=decoder)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """Load this model's decoder now, so that its first click need not wait for it."""

    load: str

    def as_json(self) -> dict[str, Any]:
        return {"load": self.load}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickMask:
    """The mask of a click. counts: COCO run lengths in the frame of the request's size_hw. bbox_xywh: pixels."""

    counts: str
    bbox_xywh: tuple[float, float, float, float]
    area_px: int
    predicted_iou: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickAnswer:
    """The answer to a click: exactly one of mask, missing and error is set.

    n: the request's, None when it could not be read. missing: why the embedding cannot be used: want it again.
    error: why there is no mask although nothing is missing.
    """

    n: int | None
    mask: ClickMask | None = None
    missing: str | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        if self.mask is None:
            return {"n": self.n, **({"error": self.error} if self.missing is None else {"missing": self.missing})}
        mask = {name: getattr(self.mask, name) for name in ClickMask.__dataclass_fields__}
        return {"n": self.n, "mask": mask}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAnswer:
    """error: None when the decoder is loaded."""

    loaded: str
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"loaded": self.loaded, "error": self.error}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The child has imported torch and waits for requests."""

    def as_json(self) -> dict[str, Any]:
        return {"ready": True}


Request: TypeAlias = ClickRequest | LoadRequest
Answer: TypeAlias = Ready | LoadAnswer | ClickAnswer

_STAMP = ("address", "model", "weights_sha256", "etag")


def to_line(message: Request | Answer) -> bytes:
    """The message as one line of ASCII JSON, with its line end."""
    return json.dumps(message.as_json(), allow_nan=False).encode() + b"\n"


def read_request(line: bytes) -> Request:
    """Raises MessageError."""
    value = _object(line)
    if "load" in value:
        return LoadRequest(load=_text(value, "load", None))
    return ClickRequest.from_json(value)


def read_answer(line: bytes) -> Answer:
    """Raises MessageError."""
    value = _object(line)
    if value.get("ready") is True:
        return Ready()
    if "loaded" in value:
        return LoadAnswer(loaded=_text(value, "loaded", None), error=value.get("error"))
    n = None if value.get("n") is None else _whole(value, "n", None)
    mask = value.get("mask")
    if mask is not None:
        return ClickAnswer(n=n, mask=_mask(mask, n))
    if "missing" in value:
        return ClickAnswer(n=n, missing=_text(value, "missing", n))
    return ClickAnswer(n=n, error=_text(value, "error", n))


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{line[:80]!r}: not JSON") from error
    if not isinstance(value, dict):
        raise MessageError(f"{line[:80]!r}: expected an object")
    return value


def _mask(value: object, n: int | None) -> ClickMask:
    if not isinstance(value, dict):
        raise MessageError(f"mask {str(value)[:80]}: expected an object", n)
    box = value.get("bbox_xywh")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) for side in box):
        raise MessageError(f"bbox_xywh {str(box)[:80]}: expected [x, y, width, height]", n)
    if not _is_number(value.get("predicted_iou")):
        raise MessageError(f"predicted_iou {value.get('predicted_iou')!r}: expected a finite number", n)
    x, y, width, height = (float(side) for side in box)
    return ClickMask(
        counts=_text(value, "counts", n),
        bbox_xywh=(x, y, width, height),
        area_px=_whole(value, "area_px", n),
        predicted_iou=float(value["predicted_iou"]),
    )


def _whole(value: Mapping[str, Any], name: str, n: int | None) -> int:
    found = value.get(name)
    if type(found) is not int:
        raise MessageError(f"{name} {str(found)[:80]!r}: expected a whole number", n)
    return found


def _text(value: Mapping[str, Any], name: str, n: int | None) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise MessageError(f"{name} {str(found)[:80]!r}: expected a string", n)
    return found


def _is_side(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MOST_SIDE_PX


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
