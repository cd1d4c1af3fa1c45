"""From a job's options to its request. Options that cannot go together are refused before anything is stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import typer
from rich.markup import escape

from db.settings import settings
from db.texts import is_storable
from orchestrator.cli.app import err, fail, print_json
from orchestrator.cli.options import JobOptions
from orchestrator.jobs.findings import matching_rows, nothing_found
from orchestrator.jobs.key_lists import KeyList
from orchestrator.jobs.request import Request
from orchestrator.jobs.survey import Survey, survey
from orchestrator.label_studio.addresses import image_address
from orchestrator.prompts.classifier import read_classifier
from orchestrator.prompts.detectors import read_detector, read_phrases
from orchestrator.prompts.files import PromptFile, list_reports, read_prompts
from orchestrator.terminal.console import printable
from orchestrator.terminal.progress import bars_on
from workers.classifiers.asked import AskedClassifier
from workers.detectors.detector import AskedDetector
from workers.detectors.kinds import DetectorKind
from workers.embeddings.address import keeps_embeddings
from workers.embeddings.store import open_store
from workers.errors import redact
from workers.models.loading import require_decoder, require_libraries
from workers.models.registry import with_base
from workers.models.spec import ModelSpec
from workers.params import ParamError, parse_params, parse_prompt_params
from workers.paths import own_path
from workers.prompts import Prompt, PromptKind
from workers.storage.source import open_source

_MOST_KEPT = 1_000_000_000


def document_root(local_files: Path | None, source: str) -> str | None:
    """Label Studio's document root, absolute. Raises PublishError if a folder's images are not below it."""
    if local_files is None:
        return None
    root = str(own_path(local_files).absolute())
    image_address(open_source(source).uri(""), root)
    return root


def job_request(source: str, spec: ModelSpec, options: JobOptions) -> Request:
    """The request of a job, read and checked. Raises what reading prompts, detectors and parameters raises."""
    classify = _asked_classifier(options)
    detector = _asked_detector(options)
    text = read_phrases(options.text or [])
    _require_one_way(spec, options, detector, text)
    if not source:
        fail("SOURCE is empty: expected a folder, or s3://bucket/prefix; this folder is `.`")
    if source.startswith("s3:") and not source.startswith("s3://"):
        fail(
            f"{source}: did you mean s3://{source.removeprefix('s3:').lstrip('/')}? A folder of that name is ./{source}"
        )
    where = source if "://" in source else str(own_path(source).absolute())
    if not is_storable(where):
        fail(f"{printable(where)}: expected a path in UTF-8; rename its folders")
    if options.label is not None and not options.label.strip():
        fail("--label: it is empty; expected words")
    is_automatic = options.prompt_file is None and not (detector or text)
    params = _params(options, is_automatic=is_automatic)
    require_decoder(spec, params.get("decoder", "torch"))
    return Request(
        source=where,
        model=spec.name,
        name=options.name,
        prompts=None if options.prompt_file is None else _read_prompts(options.prompt_file, where, spec, detector),
        detector=detector,
        text=text,
        classify=classify,
        params=params,
        label=options.label,
        include=options.include or (),
        exclude=options.exclude or (),
        limit=options.limit,
        fresh=options.fresh,
        max_failed_fraction=options.max_failed_fraction,
        keep_embeddings=_keep_embeddings(options.keep_embeddings, spec),
        dedupe=_dedupe(options),
        keys=_keys(options.keys),
        list_shards=_list_shards(options, where),
    )


def _dedupe(options: JobOptions) -> Literal["content"] | None:
    if options.dedupe is None:
        return None
    if options.prompt_file is not None:
        fail("--dedupe does not go with --prompts: two assets of the same bytes may have different prompts")
    return "content"


def _keys(given: str | None) -> str | None:
    return str(own_path(given).absolute()) if given and "://" not in given else given


def _list_shards(options: JobOptions, source: str) -> int | None:
    if options.list_shards is None:
        return None
    if not source.startswith("s3://"):
        fail("--list-shards goes with s3://: a folder is read by one process")
    if options.limit is not None or options.keys is not None:
        fail("--list-shards lists a whole prefix in no order: give it without --limit and --keys")
    return options.list_shards


def require_source(request: Request) -> None:
    """Try to list the source. Raises SourceError or TransientError, which say what to fix."""
    source = open_source(request.source, s3_endpoint=settings().s3_endpoint)
    source.check()
    if request.keys is not None:
        KeyList(source, request.keys).check()


def _keep_embeddings(given: str | None, spec: ModelSpec) -> int | Literal["all"] | None:
    if given is None:
        return None
    if not keeps_embeddings(spec):
        fail(f"--keep-embeddings: {spec.name} takes no points and no boxes, so its embeddings would answer no clicks")
    if given == "all":
        return "all"
    if not given.isdecimal() or not 1 <= int(given) <= _MOST_KEPT:
        fail(f"--keep-embeddings {given}: expected a number from 1 to {_MOST_KEPT:,}, or all")
    return int(given)


def require_embedding_store() -> None:
    """Refuse --keep-embeddings on a deployment that has no place for them."""
    if settings().embeddings is None:
        fail("--keep-embeddings: MASKFLEET_EMBEDDINGS is not set; it names the folder or s3://bucket/prefix for them")
    open_store(settings())


def _asked_detector(options: JobOptions) -> AskedDetector | None:
    threshold, classes, label_map = options.detector_threshold, options.classes, options.label_map
    if options.detector is None:
        if threshold is not None or classes or label_map:
            fail("--detector-threshold, --classes and --label-map go with --detector")
        return None
    with err.status(f"reading {escape(printable(options.detector))}"):
        return read_detector(options.detector, threshold=threshold, classes=classes, label_map=label_map)


def _asked_classifier(options: JobOptions) -> AskedClassifier | None:
    if options.classify is None:
        if options.classifier is not None or options.classify_threshold is not None:
            fail("--classifier and --classify-threshold go with --classify")
        return None
    if options.classifier is None:
        fail("--classify needs --classifier: the folder or hub name of a CLIP or SigLIP checkpoint")
    if options.label is not None:
        fail("--label names every mask, and --classify chooses names: give one of them")
    if options.prompt_file is not None or options.detector or options.text:
        fail("--classify names the masks of everything: --prompts, --detector and --text bring their own labels")
    with err.status(f"reading {escape(printable(options.classifier))}"):
        return read_classifier(options.classifier, options.classify, threshold=options.classify_threshold)


def _require_one_way(
    spec: ModelSpec, options: JobOptions, detector: AskedDetector | None, text: Sequence[Prompt]
) -> None:
    """Refuse options that mean nothing together."""
    prompts = options.prompt_file
    if not (spec.automatic or detector or text or prompts):
        fail(f"{spec.name} makes no masks of everything: tell it what to look for with --text or --prompts")
    if detector and "box" not in spec.prompts:
        fail(f"{spec.name} takes no boxes of a detector, only {' and '.join(spec.prompts)}")
    takes_phrases = detector is not None and detector.kind is DetectorKind.OPEN_VOCABULARY
    if text and prompts is not None:
        fail("--text and --prompts both say where to look: a prompt line of the file may hold a text")
    if takes_phrases and not text and prompts is None:
        fail('this detector looks for phrases: --text "red bus", or --prompts with texts')
    if detector and not takes_phrases and (text or prompts is not None):
        other = "--text" if text else "--prompts"
        fail(
            f"--detector and {other} both say where to look: give one of them; text needs a detector that takes phrases"
        )
    if text and not takes_phrases and "text" not in spec.prompts:
        fail(
            f"{spec.name} takes no text: choose a model that does (maskfleet models list), or give --detector a "
            "Grounding DINO or OWLv2 checkpoint"
        )
    if options.label is not None and (text or (detector and not takes_phrases)):
        fail(
            "--label cannot be used here: each mask's label is its class or phrase. Rename it with --label-map or "
            "--text phrase:label"
        )


def _params(options: JobOptions, *, is_automatic: bool) -> dict[str, Any]:
    """The parameters by name; `--decoder X` is `--param decoder=X`."""
    texts = {}
    for given in [*(options.param or []), *([f"decoder={options.decoder}"] if options.decoder is not None else [])]:
        name, separator, value = given.partition("=")
        if not separator:
            raise ParamError(f"--param {given!r}: expected name=value, such as points_per_side=16")
        texts[name.strip()] = value.strip()
    return parse_params(texts) if is_automatic else parse_prompt_params(texts)


def _read_prompts(address: str, source: str, spec: ModelSpec, detector: AskedDetector | None) -> PromptFile:
    """Read a prompt file and print what in it cannot be used."""
    with err.status(f"reading {escape(printable(redact(address)))}"):
        endpoint = settings().s3_endpoint
        besides: tuple[PromptKind, ...] = ("text",) if detector else ()
        found = read_prompts(address, source=source, spec=spec, s3_endpoint=endpoint, besides=besides)
    for line in list_reports(found.bad, found.bad_count):
        err.print(printable(line), style="yellow", markup=False)
    return found


def print_dry_run(request: Request, as_json: bool) -> None:
    """List with the job's filters. Print how many assets, how many bytes, a sample, and which prompts match an asset.

    Exits 1 if there is nothing to do.
    """
    open_source(request.source, s3_endpoint=settings().s3_endpoint).check()
    found = listed(request)
    if as_json:
        document = {"assets": found.assets, "bytes": found.size_bytes, "sample": found.sample}
        document |= {"skipped": dict(found.skipped), "model_version": request.model_version()}
        print_json(document | ({} if request.prompts is None else {"prompts": found.matched}))
    else:
        print(f"{found.assets:,} assets, {found.size_bytes:,} bytes; nothing was stored")
        for reason, n in sorted(found.skipped.items()):
            print(f"skipped {n:,}: {reason}")
        for key in found.sample:
            print(f"  {printable(key)}")
    print_survey(request, found)


def listed(request: Request, *, seconds: float | None = None) -> Survey:
    """What the request would find, with a count while the source is listed. seconds: for about so long."""
    with bars_on(err) as bars:
        return survey(request, seconds=seconds, progress=bars.bar("listing", unit="object").show)


def print_survey(request: Request, found: Survey) -> None:
    """Print which prompts match no asset, or several. Exits 1 if there is nothing to do."""
    for what, line in matching_rows(found.matched).items():
        if line:
            err.print(f"{what}: {printable(line)}", style="yellow", markup=False)
    if found.complete and (why := nothing_found(request.source, found.assets, found.skipped, found.matched)):
        err.print(f"nothing to do: {printable(why)}", style="red", markup=False)
        raise typer.Exit(1)


def demonstration_notice() -> str:
    return (
        "sam_nano is a demonstration model of 3 million parameters, trained on drawn scenes only. "
        "For real work: maskfleet models pull sam_vit_b"
    )


def require_weights(spec: ModelSpec) -> None:
    """Refuse a model without its weights or libraries here: `run` works on this machine, so nobody else has them."""
    from workers.models.weights import remedy, verify

    require_libraries(spec.name, spec.libraries)
    for each in with_base(spec):
        verified = verify(each)
        if not verified.ok:
            fail(f"{each.name}: {verified.path} is {verified.found}; {remedy(each)}")
