"""The options that `run` and `submit` share, written once. Each field of `JobOptions` is one option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from db.queue import HIGHEST_PRIORITY, LOWEST_PRIORITY


class Dedupe(StrEnum):
    """What tells that two assets are the same."""

    CONTENT = "content"


SourceArgument = Annotated[str, typer.Argument(help="A folder, or s3://bucket/prefix.", show_default=False)]
ModelOption = Annotated[str | None, typer.Option("--model", help="A name that `maskfleet models list` knows.")]

ParamOption = Annotated[
    list[str] | None,
    typer.Option("--param", help="name=value, with SAM's own names: points_per_side, pred_iou_thresh, …; repeatable."),
]

PromptsOption = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="Look where these say: JSON lines or COCO boxes in a file or s3:// object, or a folder of YOLO labels. "
        "`grid` (every object, without prompts) is the default.",
    ),
]

DetectorOption = Annotated[
    str | None,
    typer.Option(
        "--detector",
        help="Look where this detector finds something: a transformers checkpoint (folder or hub name), or an .onnx "
        "file in the layout of mmdeploy's RTMDet. Its classes become the labels.",
    ),
]

ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--detector-threshold",
        min=0,
        max=1,
        help="Take the detector's boxes with a score above this; 0.5, with phrases 0.3.",
    ),
]

ClassesOption = Annotated[
    str | None, typer.Option("--classes", help="Only these classes of the detector, separated by commas.")
]

LabelMapOption = Annotated[
    Path | None,
    typer.Option("--label-map", help="YAML or JSON: the detector's class -> your label, or null to drop it."),
]

TextOption = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="A phrase, or phrase:label; repeatable, each is one question. For a model that takes text, or with "
        "--detector a Grounding DINO or OWLv2 checkpoint.",
    ),
]

ClassifyOption = Annotated[
    str | None,
    typer.Option(
        "--classify",
        help="Labels, separated by commas: --classifier chooses one for each mask, the rest stays `object`.",
    ),
]

ClassifierOption = Annotated[
    str | None,
    typer.Option("--classifier", help="A CLIP or SigLIP checkpoint of transformers: a folder or a hub name."),
]

ClassifyThresholdOption = Annotated[
    float | None,
    typer.Option("--classify-threshold", min=0, max=1, help="A mask's best word must score this; 0.5."),
]

DecoderOption = Annotated[
    str | None,
    typer.Option("--decoder", help="What runs SAM's decoder: torch (the default) or onnx, with onnxruntime."),
]

LabelOption = Annotated[
    str | None,
    typer.Option(
        "--label",
        help="The class of every mask, for jobs with one class; with --prompts, of prompts without a label.",
    ),
]

IncludeOption = Annotated[
    list[str] | None, typer.Option("--include", help="Take keys that match this glob, whatever their suffix.")
]

ExcludeOption = Annotated[list[str] | None, typer.Option("--exclude", help="Leave out keys that match this glob.")]
KeysOption = Annotated[
    str | None,
    typer.Option(
        "--keys",
        metavar="FILE",
        help="List nothing: only these keys of SOURCE. A text file (a key a line), Parquet (a column `key`), or the "
        "manifest.json of an S3 Inventory; a path or s3://.",
    ),
]
ListShardsOption = Annotated[
    int | None,
    typer.Option("--list-shards", min=2, max=64, metavar="N", help="List a bucket in N ranges of keys at once."),
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Take this many assets at most.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be taken, and store nothing.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Compute again, even if an earlier job has the answer.")]
MaxFailedOption = Annotated[
    float | None,
    typer.Option(
        "--max-failed-fraction", min=0, max=1, help="Pause the job when more of its assets fail, after 1,000; 0.5."
    ),
]
KeepEmbeddingsOption = Annotated[
    str | None,
    typer.Option(
        "--keep-embeddings",
        metavar="N|all",
        help="Keep the embeddings of at most N labeled assets, or of all, so that clicks on them are answered at once.",
    ),
]
DedupeOption = Annotated[
    Dedupe | None,
    typer.Option(
        "--dedupe", help="content: assets with the same bytes get one look, across keys, sources and jobs that ask so."
    ),
]
NameOption = Annotated[str, typer.Option("--name", help="The job's name, for people.")]
DevicesOption = Annotated[str, typer.Option("--devices", help="auto, all, cpu, numbers such as 0,1, or cpu,cpu.")]


PRIORITY_HELP = "1 to 9, 5 is usual: each step up doubles the job's share of the workers. No job is left out."
PriorityOption = Annotated[
    int, typer.Option("--priority", min=LOWEST_PRIORITY, max=HIGHEST_PRIORITY, help=PRIORITY_HELP)
]


LocalFilesOption = Annotated[
    Path | None,
    typer.Option(
        "--local-files",
        metavar="ROOT",
        help="For images in a folder: Label Studio's LOCAL_FILES_DOCUMENT_ROOT, a folder above them.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What `run` and `submit` were given, unchanged. Each field is the option of the same name."""

    model: ModelOption = None
    prompts: PromptsOption = None
    detector: DetectorOption = None
    detector_threshold: ThresholdOption = None
    classes: ClassesOption = None
    label_map: LabelMapOption = None
    text: TextOption = None
    classify: ClassifyOption = None
    classifier: ClassifierOption = None
    classify_threshold: ClassifyThresholdOption = None
    param: ParamOption = None
    decoder: DecoderOption = None
    label: LabelOption = None
    include: IncludeOption = None
    exclude: ExcludeOption = None
    keys: KeysOption = None
    list_shards: ListShardsOption = None
    limit: LimitOption = None
    dry_run: DryRunOption = False
    fresh: FreshOption = False
    max_failed_fraction: MaxFailedOption = None
    keep_embeddings: KeepEmbeddingsOption = None
    dedupe: DedupeOption = None
    name: NameOption = ""

    @property
    def prompt_file(self) -> str | None:
        """The address of a prompt file. None for every object without prompts, which `grid` also means."""
        return None if self.prompts == "grid" else self.prompts


def takes_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """For a command with a parameter `options: JobOptions`: make each of its fields an option.

    typer reads a command's options from its signature, so the fields replace `options` in the signature.
    """
    own = signature(command, eval_str=True).parameters.values()
    shared = signature(JobOptions, eval_str=True).parameters
    merged: list[Parameter] = []
    for parameter in own:
        merged += shared.values() if parameter.name == "options" else [parameter.replace(kind=Parameter.KEYWORD_ONLY)]

    def with_options(**given: Any) -> None:
        options = JobOptions(**{name: given.pop(name) for name in shared})
        command(options=options, **given)

    with_options.__doc__ = command.__doc__
    with_options.__name__ = command.__name__
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
    with_options.__signature__ = Signature(merged)  # type: ignore[attr-defined]  # as inspect documents it
    return with_options
