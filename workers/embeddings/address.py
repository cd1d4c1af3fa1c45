"""The content address of an embedding, and what its file must say about itself. Never loads torch.

An address is made from everything that decides the embedding's bytes. Other weights or other image bytes have another
address. So an embedding never becomes wrong: it only expires.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum

from db.embeddings import EmbeddableAsset
from workers.models.files import encoder_of, weights_sha256
from workers.models.registry import find_model
from workers.models.spec import ModelSpec, WeightsError

_ADDRESS = re.compile(r"[0-9a-f]{8}(-fast)?/(fp16|int8)/[0-9a-f]{32}")
_HALF_WRITTEN = re.compile(r"[0-9a-f]{8}(-fast)?/(fp16|int8)/\.[^/]+\.tmp")


class EmbeddingFormat(StrEnum):
    FP16 = "fp16"  # half precision: 2 bytes a value
    INT8 = "int8"  # 1 byte a value, and one float32 scale for each channel


class EmbeddingFault(StrEnum):
    """Why an embedding cannot be read or written."""

    ABSENT = "absent"
    DAMAGED = "damaged"  # cut off, or other bytes than were written
    FOREIGN = "foreign"  # of another image or of other weights, or not our file
    UNUSABLE = "unusable"  # NaN, infinity, or too large for its format: it is not written
    AWAY = "away"  # the folder or bucket cannot be read or written now


class EmbeddingError(Exception):
    """An embedding cannot be read or written. The message says which, what was found and what was expected."""

    def __init__(self, fault: EmbeddingFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What the file of an embedding says about itself. A reader refuses another stamp than the expected one.

    weights_sha256: 64 hex digits. etag: of the image's bytes.
    """

    address: str
    model: str
    weights_sha256: str
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOf:
    """What an embedding is of: the weights and how they were run, the bytes of the image, and the format.

    model, weights_sha256: of the image encoder. A tuned decoder has none of its own: they are then its base's.
    fast: encoded in bfloat16 (precision=fast). source, key, etag: of the asset.
    """

    model: str
    weights_sha256: str
    fast: bool
    format: EmbeddingFormat
    source: str
    key: str
    etag: str

    @property
    def address(self) -> str:
        """`<first 8 of the weights' sha256>[-fast]/<format>/<first 32 of the sha256 of source, key, etag>`."""
        # No part can hold NUL: Postgres does not store it.
        content = "\0".join((self.source, self.key, self.etag))
        digest = hashlib.sha256(content.encode()).hexdigest()[:32]
        return f"{self.weights_sha256[:8]}{'-fast' if self.fast else ''}/{self.format}/{digest}"

    @property
    def stamp(self) -> Stamp:
        return Stamp(address=self.address, model=self.model, weights_sha256=self.weights_sha256, etag=self.etag)


def is_address(text: str) -> bool:
    """Whether the text has the form of an address. It can then be a path inside a store, and leads nowhere else."""
    return _ADDRESS.fullmatch(text) is not None


def is_ours(name: str) -> bool:
    """Whether a file of a store is an embedding, or what a killed writer left of one. Others are somebody else's."""
    return is_address(name) or _HALF_WRITTEN.fullmatch(name) is not None


def keeps_embeddings(spec: ModelSpec) -> bool:
    """Whether an embedding of this model answers clicks. SAM 3's would not: it takes no points and no boxes."""
    return {"points", "box"} <= set(spec.prompts)


def embedding_of(asset: EmbeddableAsset, embedding_format: EmbeddingFormat) -> EmbeddingOf:
    """What this asset's embedding is of, with the weights that labeled it.

    Raises UnknownModelError. Raises WeightsError when the model takes no clicks, or when this installation's weights
    are not those of the asset's job.
    """
    spec = find_model(asset.model)
    if not keeps_embeddings(spec):
        raise WeightsError(f"{spec.name} takes no points and no boxes, so its embeddings answer no clicks")
    sha256 = weights_sha256(spec)
    asked = asset.model_version.removeprefix(f"{spec.name}@").partition("+")[0]
    if sha256[:8] != asked:
        raise WeightsError(f"{spec.name}: these are the weights {sha256[:8]}, but the job was made with {asked}")
    encoder, encoder_sha256 = encoder_of(spec)
    return EmbeddingOf(
        model=encoder,
        weights_sha256=encoder_sha256,
        fast=asset.fast,
        format=embedding_format,
        source=asset.source,
        key=asset.key,
        etag=asset.etag,
    )
