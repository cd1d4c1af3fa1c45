"""In which order a job's assets become tasks: what a person should see first gets the lowest numbers.

Label Studio's community edition hands tasks out by their numbers (its default, sequential sampling). Its sampling by
uncertainty follows the prediction's score, but becomes random as soon as a project has two annotators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from pycocotools import mask as coco_mask

from db import publishing, results, review_order
from db.publishing import Candidate, LsProject
from db.results import StoredMask
from db.session import Connection
from orchestrator.label_studio.publication import Publication

_PAIRS_AT_ONCE = 20  # assets whose masks of two versions are in memory


def candidate_pages(publication: Publication, page: int) -> Iterator[list[Candidate]]:
    """The job's labeled assets that the project has no prediction of, in the order of the publication's options.

    `make_order` must have run, unless that order is the listing's. What was labeled since then comes at the end.
    """
    db, job_id, ls_project = publication.db, publication.job.id, publication.ls_project
    is_ordered = publication.options.order != "listing"
    if is_ordered:
        yield from _ordered(db, ls_project, page)
    unpublished = review_order.unpublished_without_order if is_ordered else publishing.unpublished
    after = publication.after_asset_id
    while True:
        with db.begin():
            found = unpublished(db, job_id=job_id, after_asset_id=after, page=page, ls_project=ls_project)
        yield found
        if len(found) < page:
            return
        after = found[-1].asset_id


def disagreement(one: Sequence[StoredMask], other: Sequence[StoredMask], size_hw: tuple[int, int]) -> float:
    """How far two versions' masks of an image differ, 0..1: the mean of 1 - IoU with the best mask of the other side.

    The mean is over the masks of both. Where one has masks and the other has none, it is 1; without masks it is 0.
    """
    if not one or not other:
        return float(bool(one) or bool(other))
    sides = [[{"size": list(size_hw), "counts": mask.counts.encode()} for mask in side] for side in (one, other)]
    ious = np.asarray(coco_mask.iou(sides[0], sides[1], [0] * len(sides[1])))
    best = [*ious.max(axis=1), *ious.max(axis=0)]
    return float(1 - np.mean(best))


def make_order(publication: Publication) -> None:
    """Put the job's assets into the order of the publication's options, in the database. Nothing for the listing's."""
    if publication.options.order == "listing":
        return
    db, job = publication.db, publication.job
    if publication.options.order == "score":
        with db.begin():
            review_order.order_by_score(db, job_id=job.id, after_asset_id=publication.after_asset_id)
        return
    with db.begin():
        review_order.start_order(db)
    after = publication.after_asset_id
    while True:
        with db.begin():
            pairs = review_order.pairs(db, job=job, after_asset_id=after, page=_PAIRS_AT_ONCE)
            both = [number for pair in pairs for number in (pair.asset_id, pair.other_id)]
            masks = results.masks_of(db, asset_ids=both)
            ranks = {
                pair.asset_id: -disagreement(masks.get(pair.asset_id, []), masks.get(pair.other_id, []), pair.size_hw)
                for pair in pairs
            }
            review_order.add_ranks(db, ranks=ranks)
        if len(pairs) < _PAIRS_AT_ONCE:
            break
        after = pairs[-1].asset_id
    with db.begin():
        review_order.finish_order(db)


def _ordered(db: Connection, ls_project: LsProject, page: int) -> Iterator[list[Candidate]]:
    position = 0
    while True:
        with db.begin():
            found, position = review_order.unpublished_in_order(
                db, ls_project=ls_project, after_position=position, page=page
            )
        if not found:
            return
        yield found
