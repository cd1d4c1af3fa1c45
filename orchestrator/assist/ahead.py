"""Keeps embeddings ready for the tasks that reviewers get next, in the order in which Label Studio hands them out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from db import clicks, embeddings
from db.publishing import LsProject
from db.session import DBAPIError, Engine, is_passing
from db.settings import settings
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.errors import LabelStudioError
from orchestrator.label_studio.setup import SAMPLING
from workers.embeddings.address import EmbeddingError, EmbeddingFormat, embedding_of
from workers.errors import redact
from workers.models.spec import ModelError

_LOOK_SECONDS = 30.0

log = logging.getLogger(__name__)


def keep_ahead(
    engine: Engine,
    client: LabelStudio,
    projects: Sequence[int],
    stop: threading.Event,
    *,
    ahead: int,
    embedding_format: EmbeddingFormat,
    after_each: Callable[[], object],
) -> None:
    """Until `stop` is set: want the embeddings of each project's next tasks, then call after_each.

    A look that fails is a line in the log; the next look tries again.
    """
    while not stop.is_set():
        try:
            count = within_budget(engine, ahead, budget_bytes=settings().embeddings_bytes // max(1, len(projects)))
            for project_id in projects if count else ():
                want_next(engine, client, project_id, count=count, embedding_format=embedding_format)
            after_each()
        except (LabelStudioError, EmbeddingError) as error:
            log.warning("the look at the next tasks failed, next try in %g s: %s", _LOOK_SECONDS, error)
        except DBAPIError as error:
            if not is_passing(error):
                raise
            log.warning(
                "Postgres does not answer, next try in %g s: %s", _LOOK_SECONDS, redact(str(error.orig).strip())
            )
        stop.wait(_LOOK_SECONDS)


def within_budget(engine: Engine, count: int, *, budget_bytes: int) -> int:
    """At most `count`, and at most what the budget holds at the mean size of what is stored.

    More would be made, and deleted at the next sweep, for ever.
    """
    with engine.begin() as db:
        found = embeddings.totals(db)
    if not found.size_bytes:
        return count
    return min(count, budget_bytes * found.stored // found.size_bytes)


def want_next(
    engine: Engine, client: LabelStudio, project_id: int, *, count: int, embedding_format: EmbeddingFormat
) -> int:
    """Want the embeddings of the next `count` tasks that nobody has annotated. Returns how many are wanted or there."""
    asset_uids = next_tasks(client, project_id, count)
    with engine.begin() as db:
        asset_ids = clicks.assets_of_tasks(db, ls_project=LsProject(client.url, project_id), asset_uids=asset_uids)
        assets = embeddings.embeddable_assets(db, asset_ids=asset_ids)
        addresses: dict[int, str] = {}
        refused: set[str] = set()
        for asset_id in asset_ids:
            if asset_id not in assets:
                continue
            try:
                addresses[asset_id] = embedding_of(assets[asset_id], embedding_format).address
            except ModelError as error:
                refused.add(str(error))
        embeddings.want(db, addresses=addresses)
    for reason in sorted(refused):
        log.info("project %d: only stored masks answer: %s", project_id, reason)
    return len(addresses)


def next_tasks(client: LabelStudio, project_id: int, count: int) -> list[str]:
    """data.asset_id of the next tasks without an annotation, in the order of the project's label stream."""
    by_score = client.get_project(project_id).sampling == SAMPLING
    filters = [
        {"filter": f"filter:tasks:{name}", "operator": "equal", "type": "Number", "value": 0}
        for name in ("total_annotations", "cancelled_annotations")
    ]
    tasks = client.list_tasks(
        project_id,
        filters,
        ordering=("tasks:predictions_score",) if by_score else ("tasks:id",),
        page_size=max(1, min(count, 500)),
    )
    found: list[str] = []
    for task in tasks:
        if len(found) == count:
            break
        if "asset_id" in task["data"]:
            found.append(str(task["data"]["asset_id"]))
    return found
