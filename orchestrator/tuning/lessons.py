"""The plan of a tuning: a job's reviewed masks, with everything that can be wrong with them said before a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from db import corrections, embeddings
from db.corrections import CorrectedAsset, CorrectedMask
from db.jobs import Job
from db.publishing import LsProject
from db.session import Connection, Engine
from db.settings import Settings
from db.states import Verdict
from orchestrator.label_studio.config import find_controls
from workers.embeddings.address import EmbeddingFormat, embedding_of
from workers.models.files import require_same_weights, weights_sha256
from workers.models.registry import find_model
from workers.prompts import Prompt, PromptError, fit, parse_prompt
from workers.tuning.outcome import require_enough
from workers.tuning.plan import Plan, PlannedAsset, PlannedMask, PlannedWrong, TuneError

_LEFT = (Verdict.KEPT, Verdict.EDITED, Verdict.ADDED)


def make_plan(
    engine: Engine, job: Job, ls_project: LsProject, *, config: str, name: str, seed: int, settings: Settings
) -> Plan:
    """What a tuning of this job's model from this project's annotations is asked. config: the project's labels.

    Raises TuneError: no or too few annotations, none with a mask, labels that the project no longer has, a project of
    another source. Raises WeightsError when the weights here are not those of the job.
    """
    spec = find_model(job.model)
    require_same_weights(spec, job.model_version)
    with engine.begin() as db:
        assets = corrections.corrected_assets(db, job_id=job.id, ls_project=ls_project)
        if not assets:
            raise _nothing_annotated(db, job, ls_project)
        _require_masks(assets)
        require_enough(len(assets), len(assets))
        _require_known_labels(assets, config, ls_project)
        addresses = _kept_addresses(db, assets, settings)
    params = job.asked.get("params", {})
    is_automatic = not any(job.asked.get(kind) for kind in ("prompts", "detector", "text"))
    return Plan(
        name=name,
        model=spec.name,
        weights_sha256=weights_sha256(spec),
        job=job.id,
        project=ls_project.project_id,
        server=ls_project.server,
        source=job.source,
        fast=params.get("precision") == "fast",
        seed=seed,
        automatic=params if is_automatic else {},
        assets=[planned_asset(asset, addresses.get(asset.asset_id)) for asset in assets],
    )


def _nothing_annotated(db: Connection, job: Job, ls_project: LsProject) -> TuneError:
    others = corrections.annotated_sources(db, ls_project=ls_project)
    where = f"project {ls_project.project_id}"
    if not others:
        return TuneError(f"{where}: no annotations of job {job.id} were read; run `maskfleet review {job.id}` first")
    source, number = others[0]
    if all(source != job.source for source, _ in others):
        return TuneError(
            f"{where} has annotations of another source: {source} (job {number}); job {job.id} is over {job.source}"
        )
    return TuneError(
        f"{where}: no annotation began from job {job.id}'s masks, but there are of job {number}: tune that one"
    )


def _require_masks(assets: Sequence[CorrectedAsset]) -> None:
    if not any(mask.verdict in _LEFT and mask.counts for asset in assets for mask in asset.masks):
        raise TuneError(
            f"{len(assets)} annotations, and none has a mask: people deleted everything, or their regions cannot be "
            "read as masks (`maskfleet review` counts those)"
        )


def _require_known_labels(assets: Sequence[CorrectedAsset], config: str, ls_project: LsProject) -> None:
    """Each label of the annotations is still one of the project's."""
    offered = {label for control in find_controls(config).by_kind.values() for label in control.labels}
    used = {mask.label for asset in assets for mask in asset.masks if mask.verdict in _LEFT}
    gone = sorted(used - offered)
    if gone:
        raise TuneError(
            f"project {ls_project.project_id}: annotations have the label {', '.join(map(repr, gone[:5]))}, and the "
            f"project's labels are {', '.join(map(repr, sorted(offered)[:10]))}: was one renamed? Give it its old "
            "name, or correct those tasks and run `maskfleet review` again"
        )


def _kept_addresses(db: Connection, assets: Sequence[CorrectedAsset], settings: Settings) -> dict[int, str]:
    """The addresses of kept embeddings, by asset, used from now on. Empty where no store is set."""
    if settings.embeddings is None:
        return {}
    found = embeddings.embeddable_assets(db, asset_ids=[asset.asset_id for asset in assets])
    kind = EmbeddingFormat(settings.embeddings_format)
    addresses = {asset_id: embedding_of(asset, kind).address for asset_id, asset in found.items()}
    stored = embeddings.stored_of(db, addresses=list(addresses.values()))
    embeddings.touch(db, addresses=sorted(stored))
    return {asset_id: address for asset_id, address in addresses.items() if address in stored}


def planned_asset(asset: CorrectedAsset, embedding: str | None) -> PlannedAsset:
    """What an annotated asset teaches: the masks that people left, and the prompts of those that they deleted."""
    left = [mask for mask in asset.masks if mask.verdict in _LEFT and mask.counts is not None]
    return PlannedAsset(
        key=asset.key,
        etag=asset.etag,
        size_hw=asset.size_hw,
        embedding=embedding,
        masks=[PlannedMask(counts=mask.counts or "", label=mask.label) for mask in left],
        wrong=[
            wrong for mask in asset.masks if mask.verdict is Verdict.DELETED and (wrong := _wrong(mask, asset.size_hw))
        ],
    )


def _wrong(mask: CorrectedMask, size_hw: tuple[int, int]) -> PlannedWrong | None:
    """The prompt of a deleted mask: its box or its one point; else the box around it. None when nothing is known."""
    asked = _in_pixels(mask.prompt or {}, size_hw)
    if asked is not None and asked.box_xyxy is not None:
        return PlannedWrong(box_xyxy=asked.box_xyxy)
    if asked is not None and len(asked.points) == 1:
        return PlannedWrong(point_xy=asked.points[0][:2])
    if mask.bbox_xywh is None or not mask.bbox_xywh[2]:
        return None
    x, y, width, height = mask.bbox_xywh
    return PlannedWrong(box_xyxy=(x, y, x + width, y + height))


def _in_pixels(prompt: Mapping[str, Any], size_hw: tuple[int, int]) -> Prompt | None:
    """Where a mask was asked for. A prompt file's prompts are stored as they were given: fractions, or another size."""
    given = {name: prompt[name] for name in ("box_xyxy", "points", "size_wh") if name in prompt}
    try:
        return fit(parse_prompt(given), size_hw[::-1])
    except PromptError:
        return None
