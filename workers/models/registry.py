"""The models that a job may name: those of `MODELS`, and the models of one's own in the weights folder."""

from __future__ import annotations

from dataclasses import replace

from workers.errors import meant
from workers.models.files import is_present, weights_sha256
from workers.models.loading import missing_libraries
from workers.models.own import OwnModel, is_own, own_names, read_own, require_own_name, toml_path, weights_file
from workers.models.spec import ModelError, ModelSpec, UnknownModelError, WeightsError
from workers.params import DECODERS
from workers.prompts import PromptKind

_SAM_PROMPTS: tuple[PromptKind, ...] = ("box", "points")
_UNASKED = ("segment-anything", "mobile-sam")  # the families to choose from when the job names no model

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
        # Chosen on eight scenes that are not in the benchmark. SAM's own values are for a model two hundred times
        # larger. Twice as many points on a side take four times as long and find hardly more.
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
        # From one public Git LFS pointer. The same place has the sha256 of vit_b and vit_h that others publish too.
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


def find_model(name: str) -> ModelSpec:
    """The model of this name: the registry's, or one's own. Raises UnknownModelError, which lists the known names.

    Raises WeightsError when the TOML of a model of one's own is wrong.
    """
    if name in MODELS:
        return MODELS[name]
    if is_own(name):
        return spec_of(read_own(name))
    known = (*MODELS, *own_names())
    raise UnknownModelError(f"unknown model {name!r}{meant(name, known)}; known: {', '.join(known)}")


def known_models() -> tuple[list[ModelSpec], list[str]]:
    """Every model that a job may name here, and a line about each model of one's own that cannot be used."""
    specs, faults = list(MODELS.values()), []
    for name in own_names():
        if name in MODELS:
            faults.append(f"{toml_path(name)}: {name} is a name of the registry, so this file is ignored; rename it")
            continue
        try:
            specs.append(find_model(name))
        except ModelError as error:
            faults.append(str(error))
    return specs, faults


def architecture_of(architecture: str, *, of: str = "") -> ModelSpec:
    """The registry's entry that a model of one's own is built as. Raises WeightsError when there is none.

    of: the model that names it, for the message.
    """
    built = MODELS.get(architecture)
    if built is None or built.hub is not None:
        known = ", ".join(name for name, spec in MODELS.items() if spec.hub is None)
        raise WeightsError(f"{of}{': its ' if of else ''}architecture {architecture!r} is not one of {known}")
    return built


def require_free_name(name: str) -> None:
    """Raise WeightsError unless a model of one's own may take this name here."""
    require_own_name(name)
    if name in MODELS:
        raise WeightsError(f"{name} is a model of the registry: choose another name")
    if is_own(name):
        raise WeightsError(
            f"{name} is here already ({toml_path(name)}): choose another name, or remove it with "
            f"`maskfleet models remove {name}` first"
        )


def with_base(spec: ModelSpec) -> list[ModelSpec]:
    """The models whose files this model needs: its base, if it has one, and itself.

    Raises WeightsError when the base that is known here is not the one that the model names.
    """
    if spec.base is None:
        return [spec]
    base = find_model(spec.base)
    found = (base.architecture, base.base, weights_sha256(base))
    if found != (spec.architecture, None, spec.base_sha256):
        raise WeightsError(
            f"{spec.name}: its base {base.name} is {found[0]} with sha256 {found[2]}, expected a whole "
            f"{spec.architecture} with sha256 {spec.base_sha256}"
        )
    return [base, spec]


def spec_of(own: OwnModel) -> ModelSpec:
    """The description of a model of one's own. Raises WeightsError when it is built as nothing that we know."""
    built = architecture_of(own.architecture, of=own.name)
    return replace(
        built,
        name=own.name,
        loader=built.loader if own.base is None else "workers.models.tuned:load",
        architecture=own.architecture,
        weights_file=weights_file(own.name),
        url=None,
        sha256=own.sha256,
        size_bytes=own.size_bytes,
        parameter_count=own.parameter_count,
        licence=own.licence,
        defaults={**built.defaults, **own.defaults},
        own_defaults=own.defaults,
        demonstration=False,
        base=own.base,
        base_sha256=own.base_sha256,
    )


def largest_present() -> ModelSpec:
    """The largest official SAM or MobileSAM that has its weights and libraries here, otherwise sam_nano."""
    official = [spec for spec in MODELS.values() if spec.family in _UNASKED and not spec.demonstration]
    present = [spec for spec in official if is_present(spec) and not missing_libraries(spec.libraries)]
    return max(present, key=lambda spec: spec.parameter_count, default=MODELS["sam_nano"])
