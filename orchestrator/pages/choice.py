"""Which of a job's assets a gallery shows. A job is never read as a whole: of a large one, a sample is looked at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from db import results, samples
from db.jobs import Counts, Job
from db.session import Connection
from orchestrator.label_studio.names import DEFAULT_LABEL
from workers.errors import meant

MAX_CARDS = 200
_LOOKED_AT = 1000  # labeled assets, spread over the job, among which a label or the worst are sought


class ChoiceError(Exception):
    """There is nothing to choose from. The message says why."""


class Order(StrEnum):
    LISTING = "listing"  # evenly spread over the job
    WORST = "worst"  # the lowest mean predicted IoU first
    RANDOM = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is asked for. limit: assets with pictures. label: only assets and masks with it."""

    limit: int = MAX_CARDS
    label: str | None = None
    order: Order = Order.LISTING
    only_failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """asset_ids: in the order in which they are shown. said: what they are, in a sentence without its full stop."""

    asset_ids: Sequence[int]
    said: str


def choose(db: Connection, job: Job, counts: Counts, choice: Choice) -> Chosen:
    """Raises ChoiceError for a label that no mask of the job has."""
    if choice.only_failed:
        return Chosen(asset_ids=[], said="Only failed assets were asked for")
    labeled = counts.labeled - counts.without_prompts
    is_random = choice.order is Order.RANDOM
    if choice.label is None and choice.order is not Order.WORST:
        ids = samples.sample_ids(db, job_id=job.id, limit=choice.limit, at_random=is_random)
        return Chosen(asset_ids=_shuffled(ids) if is_random else ids, said=_said(len(ids), labeled, choice))
    if choice.label is not None:
        _require_label(db, job, choice.label)
    looked_at = samples.sample_ids(db, job_id=job.id, limit=max(_LOOKED_AT, choice.limit), at_random=is_random)
    ious = samples.mean_ious(db, asset_ids=looked_at, label=choice.label)
    ids = [asset_id for asset_id in looked_at if asset_id in ious or choice.label is None]
    if choice.order is Order.WORST:
        # Assets without masks come last: nothing says how bad they are.
        ids.sort(key=lambda asset_id: ious.get(asset_id, 2.0))
    elif is_random:
        ids = _shuffled(ids)
    shown = ids[: choice.limit] if choice.order is not Order.LISTING else _spread(ids, choice.limit)
    said = _said(len(shown), len(ids) if choice.label else labeled, choice)
    return Chosen(
        asset_ids=shown, said=said + (f", of {len(looked_at):,} looked at" if len(looked_at) < labeled else "")
    )


def _require_label(db: Connection, job: Job, label: str) -> None:
    known = {*results.labels_of(db, job_id=job.id), DEFAULT_LABEL}
    if label not in known:
        raise ChoiceError(f"--label {label}{meant(label, known)}: job {job.id} has {', '.join(sorted(known)[:20])}")


def _shuffled(ids: Sequence[int]) -> list[int]:
    return random.sample(ids, len(ids))


def _spread(ids: Sequence[int], limit: int) -> list[int]:
    return [ids[n * len(ids) // limit] for n in range(limit)] if len(ids) > limit else list(ids)


def _said(shown: int, there: int, choice: Choice) -> str:
    with_label = f" with {choice.label}" if choice.label else ""
    number = f"{shown:,} of {there:,} assets" if shown < there else f"{shown:,} asset{'' if shown == 1 else 's'}"
    how = {
        Order.LISTING: ", evenly spread" if shown < there else "",
        Order.WORST: ", the lowest mean predicted IoU first",
        Order.RANDOM: " at random" if shown < there else " in random order",
    }
    return f"{number}{with_label}{how[choice.order]}"
