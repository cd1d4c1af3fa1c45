"""The description of a model before it is loaded, and the interface of a loaded model. Never loads torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from workers.params import AutomaticParams, PromptParams
from workers.prompts import Prompt, PromptKind

if TYPE_CHECKING:  # NumPy and Pillow, for commands that never see a pixel
    from workers.images.pixels import RgbImage
    from workers.masks import Mask

# The encoder's result for one image, which the decoder needs. Only the model family that made it reads it.
Embedding: TypeAlias = Any


class ModelError(Exception):
    """A model cannot be used. The message says which model, what was found and what to do."""


class UnknownModelError(ModelError):
    """No registry entry has this name."""


class MissingLibraryError(ModelError):
    """A library of the optional extra `models` is needed and not installed."""


class WeightsError(ModelError):
    """The weights are absent, damaged, another model's, or cannot be downloaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The description of a model before it is loaded.

    loader: "module:function", called as function(spec, device).
    weights_file: name in the weights folder, or beside this file when `url` is None (shipped in the package).
    sha256: of the weights file, 64 hex digits.
    prompts: the kinds of prompts that it takes.
    libraries: the libraries of the optional extra `models` that it needs.
    hub: the source of a model that comes as a folder. weights_file is then the folder; its content gives the sha256.
    automatic: whether it makes masks without prompts.
    decoders: the runtimes that can run its decoder, of params.DECODERS.
    defaults: its own AutomaticParams where they differ, JSON-safe.
    own_defaults: those of them that the TOML of a model of one's own sets.
    demonstration: the model is too small for real work. This is said wherever its masks are shown.
    architecture: the name of the registry whose modules it is built from. Left out, it is the model's own name.
    base, base_sha256: of a model whose file holds the mask decoder alone: the model that has its other tensors, and the
        sha256 of that model's file. A base has no base.
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
    architecture: str = ""
    base: str | None = None
    base_sha256: str | None = None
    own_defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.architecture:
            object.__setattr__(self, "architecture", self.name)

    @property
    def is_own(self) -> bool:
        """Whether somebody here added it: its weights and its TOML are in the weights folder (see `own`)."""
        return self.architecture != self.name


class Model(Protocol):
    """The interface that every model family offers to the pipeline. Stateless: there is no "current image".

    Images are (H, W, 3) uint8 RGB, upright. Any call may raise torch.cuda.OutOfMemoryError. After it the model is still
    usable, and the pipeline tries again with fewer images. After any other CUDA error the process is unusable.
    """

    def embed(self, images: Sequence[RgbImage], *, fast: bool = False) -> list[Embedding]:
        """Encode images of any sizes in one pass. One embedding for each image, in the same order.

        fast: for a job with precision=fast, where the encoder may round more.
        """
        ...

    def automatic(self, image: RgbImage, embedding: Embedding, params: AutomaticParams) -> list[Mask]:
        """Every object of one image, without prompts. embedding: the result of `embed` for this image."""
        ...

    def prompted(
        self, image: RgbImage, embedding: Embedding, prompts: Sequence[Prompt], params: PromptParams
    ) -> list[list[Mask]]:
        """The masks of each prompt, in the order of the prompts. Each gives one mask; `params` or a text may give more.

        prompts: any number, of kinds that the model takes, fitted to this image. The memory is bounded. The caller sets
        the masks' labels. embedding: the result of `embed` for this image.
        """
        ...
