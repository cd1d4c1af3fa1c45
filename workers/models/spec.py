"""What is known of a model without loading it, and what the pipeline needs of it once loaded. Never loads torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from workers.images.pixels import RgbImage
from workers.masks import Mask
from workers.params import AutomaticParams, PromptParams
from workers.prompts import Prompt, PromptKind

# What a model remembers of one image between its encoder and its decoder; only the family that made it looks inside.
Embedding: TypeAlias = Any


class ModelError(Exception):
    """A model cannot be had. The message says which, what was found and what to do."""


class UnknownModelError(ModelError):
    """The name is in no registry entry."""


class MissingLibraryError(ModelError):
    """A library of the optional extra `models` is needed and not installed."""


class WeightsError(ModelError):
    """The weights are absent, damaged, another model's, or cannot be downloaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What is known of a model without loading it.

    loader: "module:function", called as function(spec, device). weights_file: name in the weights folder, or beside
    this file when `url` is None (shipped in the package). sha256: of the weights file, 64 hex digits. prompts: what it
    takes besides automatic masks. libraries: what of the optional extra `models` it is loaded with. hub: where a model
    comes from whose weights are a folder, weights_file, with no sha256 of its own but its content's. automatic: whether
    it makes masks without prompts. decoders: what can run its decoder, of params.DECODERS. defaults: its own
    AutomaticParams where they differ, JSON-safe. demonstration: too small for real work, and said so wherever its masks
    are shown.
    """

    name: str
    family: str
    loader: str
    weights_file: str
    url: str | None
    sha256: str
    size_bytes: int
    parameter_count: int
    prompts: tuple[PromptKind, ...]
    licence: str
    libraries: tuple[str, ...] = ()
    hub: str | None = None
    automatic: bool = True
    decoders: tuple[str, ...] = ("torch",)
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    demonstration: bool = False


class Model(Protocol):
    """What the pipeline needs of any family. Stateless: nothing remembers "the current image".

    Images are (H, W, 3) uint8 RGB, upright. Any call may raise torch.cuda.OutOfMemoryError, which leaves the model
    usable: the pipeline asks again with fewer images. Any other CUDA error leaves the process unusable.
    """

    def embed(self, images: Sequence[RgbImage], *, fast: bool = False) -> list[Embedding]:
        """Encode the images, of any sizes, in one pass; one embedding an image, in their order.

        fast: for a job with precision=fast, where the encoder may round more.
        """
        ...

    def automatic(self, image: RgbImage, embedding: Embedding, params: AutomaticParams) -> list[Mask]:
        """Every object of one image, without prompts; `embedding` is what `embed` gave for this image."""
        ...

    def prompted(
        self, image: RgbImage, embedding: Embedding, prompts: Sequence[Prompt], params: PromptParams
    ) -> list[list[Mask]]:
        """The masks that each prompt asks for, in their order: one a prompt, or as `params` and text prompts want.

        prompts: of kinds that the model takes, fitted to this image. Any number of them, in bounded memory; labels are
        the caller's. `embedding` is what `embed` gave for this image.
        """
        ...
