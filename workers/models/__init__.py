"""The models a job may name, and where their weights are. One file a family; this one never loads torch.

`MODELS` is the whole list: a name that is not in it is an error that names the known ones. `load` turns a name into a
`Model`, the stateless object that the pipeline drives, and is called in the worker's child process only.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

from db.settings import settings
from workers.images.decode import RgbImage
from workers.masks import Mask
from workers.models.folders import checkpoint_files, has_weights, identity
from workers.params import DECODERS, AutomaticParams, ParamError
from workers.prompts import Prompt, PromptKind, PromptParams

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


_SAM_PROMPTS: tuple[PromptKind, ...] = ("box", "points")
_UNASKED = ("segment-anything", "mobile-sam")  # the families taken where no model is named

# SAM2AutomaticMaskGenerator's, where they are not SamAutomaticMaskGenerator's.
_SAM2_DEFAULTS = {"pred_iou_thresh": 0.8}

MODELS: dict[str, ModelSpec] = {
    "sam_vit_h": ModelSpec(
        name="sam_vit_h",
        family="segment-anything",
        loader="workers.models.sam:load",
        weights_file="sam_vit_h_4b8939.pth",
        url="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        size_bytes=2_564_550_879,
        parameter_count=641_090_608,
        prompts=_SAM_PROMPTS,
        decoders=DECODERS,
        licence="Apache-2.0",
    ),
    "sam_vit_l": ModelSpec(
        name="sam_vit_l",
        family="segment-anything",
        loader="workers.models.sam:load",
        weights_file="sam_vit_l_0b3195.pth",
        url="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        size_bytes=1_249_524_607,
        parameter_count=312_342_832,
        prompts=_SAM_PROMPTS,
        decoders=DECODERS,
        licence="Apache-2.0",
    ),
    "sam_vit_b": ModelSpec(
        name="sam_vit_b",
        family="segment-anything",
        loader="workers.models.sam:load",
        weights_file="sam_vit_b_01ec64.pth",
        url="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        size_bytes=375_042_383,
        parameter_count=93_735_472,
        prompts=_SAM_PROMPTS,
        decoders=DECODERS,
        licence="Apache-2.0",
    ),
    "mobile_sam": ModelSpec(
        name="mobile_sam",
        family="mobile-sam",
        loader="workers.models.sam:load",
        weights_file="mobile_sam.pt",
        url="https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/c12dd83cbe26dffdcc6a0f9e7be2f6fb024df0ed/weights/mobile_sam.pt",
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        size_bytes=40_728_226,
        parameter_count=10_130_092,
        prompts=_SAM_PROMPTS,
        decoders=DECODERS,
        licence="Apache-2.0",
        libraries=("timm",),
    ),
    "sam_nano": ModelSpec(
        name="sam_nano",
        family="segment-anything",
        loader="workers.models.sam:load",
        weights_file="sam_nano.safetensors",
        url=None,
        sha256="d10efacaf8cb92e004135c7b99a3b904f39039fe47fbb5ae89787f2745fea70e",
        size_bytes=5_982_184,
        parameter_count=2_978_464,
        prompts=_SAM_PROMPTS,
        decoders=DECODERS,
        licence="Apache-2.0",
        # Chosen on eight scenes apart from those of the benchmark: SAM's own values are for a model two hundred times
        # larger, and twice as many points a side cost four times as much and find hardly more.
        defaults={
            "points_per_side": 12,
            "pred_iou_thresh": 0.6,
            "stability_score_thresh": 0.75,
            "box_nms_thresh": 0.4,
        },
        demonstration=True,
    ),
    "sam_hq_vit_h": ModelSpec(
        name="sam_hq_vit_h",
        family="sam-hq",
        loader="workers.models.sam:load",
        weights_file="sam_hq_vit_h.pth",
        url="https://huggingface.co/lkeab/hq-sam/resolve/main/sam_hq_vit_h.pth",
        sha256="a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35",
        size_bytes=2_570_940_653,
        parameter_count=642_686_000,
        prompts=_SAM_PROMPTS,
        licence="Apache-2.0",
    ),
    "sam_hq_vit_l": ModelSpec(
        name="sam_hq_vit_l",
        family="sam-hq",
        loader="workers.models.sam:load",
        weights_file="sam_hq_vit_l.pth",
        url="https://huggingface.co/lkeab/hq-sam/resolve/main/sam_hq_vit_l.pth",
        # From one public Git LFS pointer; its neighbours' for vit_b and vit_h are those that others publish too.
        sha256="e1a6c385d62bf005ded91a54d5ec55c985cfc4103ef89c08d90f39f04934c343",
        size_bytes=1_254_865_805,
        parameter_count=313_676_080,
        prompts=_SAM_PROMPTS,
        licence="Apache-2.0",
    ),
    "sam_hq_vit_b": ModelSpec(
        name="sam_hq_vit_b",
        family="sam-hq",
        loader="workers.models.sam:load",
        weights_file="sam_hq_vit_b.pth",
        url="https://huggingface.co/lkeab/hq-sam/resolve/main/sam_hq_vit_b.pth",
        sha256="14a9d662cd6f5a9c2dba6d40ab0058d88d287e4a18fd6fdc6ad5fb1a3fdeaa57",
        size_bytes=379_335_069,
        parameter_count=94_806_576,
        prompts=_SAM_PROMPTS,
        licence="Apache-2.0",
    ),
    "sam2.1_tiny": ModelSpec(
        name="sam2.1_tiny",
        family="sam2.1",
        loader="workers.models.sam2:load",
        weights_file="sam2.1_hiera_tiny.pt",
        url="https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_tiny.pt",
        sha256="7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        size_bytes=156_008_466,
        parameter_count=31_440_721,
        prompts=_SAM_PROMPTS,
        licence="Apache-2.0",
        libraries=("transformers",),
        defaults=_SAM2_DEFAULTS,
    ),
    "sam2.1_small": ModelSpec(
        name="sam2.1_small",
        family="sam2.1",
        loader="workers.models.sam2:load",
        weights_file="sam2.1_hiera_small.pt",
        url="https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_small.pt",
        sha256="6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
        size_bytes=184_416_285,
        parameter_count=38_538_577,
        prompts=_SAM_PROMPTS,
        licence="Apache-2.0",
        libraries=("transformers",),
        defaults=_SAM2_DEFAULTS,
    ),
    "sam2.1_base_plus": ModelSpec(
        name="sam2.1_base_plus",
        family="sam2.1",
        loader="workers.models.sam2:load",
        weights_file="sam2.1_hiera_base_plus.pt",
        url="https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_base_plus.pt",
        sha256="a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
        size_bytes=323_606_802,
        parameter_count=73_328_401,
        prompts=_SAM_PROMPTS,
        licence="Apache-2.0",
        libraries=("transformers",),
        defaults=_SAM2_DEFAULTS,
    ),
    "sam2.1_large": ModelSpec(
        name="sam2.1_large",
        family="sam2.1",
        loader="workers.models.sam2:load",
        weights_file="sam2.1_hiera_large.pt",
        url="https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_large.pt",
        sha256="2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
        size_bytes=898_083_611,
        parameter_count=216_924_865,
        prompts=_SAM_PROMPTS,
        licence="Apache-2.0",
        libraries=("transformers",),
        defaults=_SAM2_DEFAULTS,
    ),
    "sam3": ModelSpec(
        name="sam3",
        family="sam3",
        loader="workers.models.sam3:load",
        weights_file="sam3",
        url=None,
        sha256="",
        size_bytes=0,
        parameter_count=840_376_374,
        prompts=("text", "exemplar"),
        licence="SAM License",
        libraries=("transformers",),
        hub="facebook/sam3",
        automatic=False,
    ),
}

ONNX_LIBRARIES = ("onnx", "onnxruntime")  # what decoder=onnx needs

_loaded: dict[tuple[str, str, str], Model] = {}
_loading = threading.Lock()


def find(name: str) -> ModelSpec:
    """The registry entry of this name. Raises UnknownModelError naming the known ones."""
    if name not in MODELS:
        raise UnknownModelError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def weights_path(spec: ModelSpec) -> Path:
    """Where this model's weights are, or would be once pulled; nothing is looked at."""
    if spec.url is None and spec.hub is None:
        return Path(__file__).with_name(spec.weights_file)
    return weights_dir() / spec.weights_file


def weights_dir() -> Path:
    """The folder of pulled weights: MASKFLEET_WEIGHTS_DIR, else maskfleet/weights in the user's cache folder."""
    configured = settings().weights_dir
    if configured is not None:
        return configured.expanduser()
    # The XDG rules have a relative or empty XDG_CACHE_HOME ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = xdg if xdg.is_absolute() else Path.home() / ".cache"
    return cache / "maskfleet" / "weights"


def is_present(spec: ModelSpec) -> bool:
    """Whether a file lies where the weights belong; whether it is the right one is for `weights.verify` and `load`."""
    if spec.hub is not None:
        return has_weights(weights_path(spec))
    return weights_path(spec).is_file()


def weights_sha256(spec: ModelSpec) -> str:
    """The sha256 that stands for the model's weights: the pinned one, or, of a folder, that of what lies here.

    Raises WeightsError where that folder is absent.
    """
    if spec.hub is None:
        return spec.sha256
    folder = weights_path(spec)
    if not has_weights(folder):
        raise WeightsError(f"{spec.name}: no weights at {folder}; run `maskfleet models pull {spec.name}`")
    return identity(checkpoint_files(folder))


def require_same_weights(spec: ModelSpec, version: str) -> None:
    """Raise WeightsError where a job of this model_version was given another folder than lies here."""
    if spec.hub is None:
        return
    found = weights_sha256(spec)[:8]
    asked = version.removeprefix(f"{spec.name}@").partition("+")[0]
    if found != asked:
        raise WeightsError(
            f"{spec.name}: {weights_path(spec)} is {found}, the job was given {asked}; put the same files there, or "
            "submit again"
        )


def missing_libraries(libraries: Sequence[str]) -> list[str]:
    """Those that are not installed; none is imported."""
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def require_libraries(what: str, libraries: Sequence[str]) -> None:
    """Raise MissingLibraryError, naming what needs them, where one of these is not installed."""
    if missing := missing_libraries(libraries):
        raise MissingLibraryError(
            f'{what} needs {" and ".join(missing)}, not installed here: run `pip install "maskfleet[models]"`'
        )


def require_decoder(spec: ModelSpec, decoder: str) -> None:
    """Raise ParamError where this model cannot be decoded so."""
    if decoder not in spec.decoders:
        raise ParamError(f"decoder={decoder}: {spec.name} takes {' or '.join(spec.decoders)} only")


def largest_present() -> ModelSpec:
    """The largest official SAM or MobileSAM whose weights and libraries are present, else sam_nano."""
    official = [spec for spec in MODELS.values() if spec.family in _UNASKED and not spec.demonstration]
    present = [spec for spec in official if is_present(spec) and not missing_libraries(spec.libraries)]
    return max(present, key=lambda spec: spec.parameter_count, default=MODELS["sam_nano"])


def model_version(spec: ModelSpec, asked: Mapping[str, Any]) -> str:
    """`<model>@<first 8 of the weights' sha256>+<first 8 of the sha256 of asked>`: equal exactly when answers are.

    asked: JSON-safe; the mode, the prompts and the parameters in force, that is with spec.defaults filled in, so that
    a release with other defaults is another version. Its key order does not matter. Raises ValueError for NaN or
    infinity and TypeError for what JSON cannot hold.
    """
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{spec.name}@{weights_sha256(spec)[:8]}+{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def load(spec: ModelSpec, device: str) -> Model:
    """The model on this device ("cpu", "cuda", "cuda:1"), loaded on the first call and kept. Threads may call it.

    Raises WeightsError where the file is absent, damaged or another model's, MissingLibraryError where its libraries
    are not installed, torch.cuda.OutOfMemoryError where the device has no room for it.
    """
    require_libraries(spec.name, spec.libraries)
    key = (spec.name, weights_sha256(spec), device)
    with _loading:
        if key not in _loaded:
            module, function = spec.loader.split(":")
            _loaded[key] = cast(Model, getattr(importlib.import_module(module), function)(spec, device))
        return _loaded[key]
