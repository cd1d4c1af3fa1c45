"""Answers clicks from kept embeddings with the decoders of models. No image encoder is built, no image is read.

What depends on an image alone is computed at its first click, and kept for the next ones within a number of bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from workers.clicks.messages import ClickAnswer, ClickMask, ClickRequest
from workers.embeddings.address import EmbeddingError, EmbeddingFault
from workers.embeddings.codec import decode
from workers.embeddings.store import EmbeddingStore
from workers.engine.promptable import Decode, Promptable
from workers.engine.prompted import prompt_decoder, prompted_masks
from workers.errors import redact
from workers.masks import decode_counts
from workers.models.decoders import load_decoder
from workers.models.files import encoder_of, weights_sha256
from workers.models.registry import find_model
from workers.params import PromptParams
from workers.prompts import fit, takes

# A kept decoder of SAM holds 3.5 times its embedding's float32 bytes (14 MiB), one of SAM-HQ or SAM 2.1 up to twice.
_TIMES_ITS_EMBEDDING = 4
MOST_KEPT_BYTES = 80 * 1024 * 1024  # five images of a vit_*; the child's own memory then stays below 600 MB

# of the decoder the name and the weights' sha256, the address, and the run lengths of the mask that is refined
_Key: TypeAlias = tuple[str, str, str, str | None]


@dataclass(frozen=True, slots=True)
class _Kept:
    decode: Decode
    size_bytes: int


class Decoding:
    """The loaded decoders, and the images that were clicked last. For one thread."""

    def __init__(self, store: EmbeddingStore, *, most_kept_bytes: int = MOST_KEPT_BYTES) -> None:
        self._store = store
        self._most_kept_bytes = most_kept_bytes
        self._models: dict[str, tuple[str, Promptable]] = {}  # by name, with the weights' sha256
        self._images: OrderedDict[_Key, _Kept] = OrderedDict()

    @property
    def kept_bytes(self) -> int:
        """The most bytes that the kept images can have now."""
        return sum(kept.size_bytes for kept in self._images.values())

    def load(self, model: str) -> Promptable:
        """The decoder of this model, on the CPU. Loaded again when the name has other weights. Raises ModelError."""
        spec = find_model(model)
        sha256 = weights_sha256(spec)
        if self._models.get(model, ("", None))[0] != sha256:
            self._models[model] = sha256, load_decoder(spec, "cpu")
        return self._models[model][1]

    def answer(self, request: ClickRequest) -> ClickAnswer:
        """The answer to a click. Raises nothing: each problem is in the answer."""
        try:
            return ClickAnswer(n=request.n, mask=self._mask(request))
        except EmbeddingError as error:
            said = f"{error.fault}: {redact(str(error))}"
            if error.fault is EmbeddingFault.AWAY:  # its bytes may be right, and could not be written again now
                return ClickAnswer(n=request.n, error=said)
            return ClickAnswer(n=request.n, missing=said)
        except Exception as error:  # noqa: BLE001  a click costs no other click its answer
            return ClickAnswer(n=request.n, error=redact(f"{type(error).__name__}: {error}"))

    def _mask(self, request: ClickRequest) -> ClickMask:
        spec = find_model(request.decoder or request.stamp.model)
        height, width = request.size_hw
        prompt = fit(request.prompt, (width, height))
        if refused := takes(prompt, spec.prompts):
            raise ValueError(refused)
        if (own := encoder_of(spec)[1]) != request.stamp.weights_sha256:
            raise EmbeddingError(
                EmbeddingFault.FOREIGN,
                f"{request.stamp.address}: of weights {request.stamp.weights_sha256[:8]}, here are {own[:8]}",
            )
        model = self.load(spec.name)
        kept = self._image(spec.name, model, request)
        [[mask]] = prompted_masks(model, None, [prompt], PromptParams(), size_hw=request.size_hw, decode=kept.decode)
        return ClickMask(
            counts=mask.counts, bbox_xywh=mask.bbox_xywh, area_px=mask.area_px, predicted_iou=mask.predicted_iou
        )

    def _image(self, name: str, model: Promptable, request: ClickRequest) -> _Kept:
        """The kept decoder of the request's image, made if there is none."""
        key = (name, self._models[name][0], request.stamp.address, request.mask_counts)
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        mask = None if request.mask_counts is None else decode_counts(request.mask_counts, request.size_hw)
        embedding = decode(self._store.read(request.stamp.address), request.stamp)
        made = _Kept(prompt_decoder(model, embedding, mask), _TIMES_ITS_EMBEDDING * _size_bytes(embedding))
        while self._images and self.kept_bytes + made.size_bytes > self._most_kept_bytes:
            self._images.popitem(last=False)
        self._images[key] = made
        return made


def _size_bytes(embedding: Any) -> int:
    levels = [embedding] if isinstance(embedding, Tensor) else embedding
    return sum(level.nbytes for level in levels)
