"""A labeled and published asset on Postgres, and requests about it as Label Studio sends them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from db import embeddings, publishing
from db.jobs import Job
from db.publishing import Intent, LsProject
from orchestrator.label_studio.addresses import asset_uid
from orchestrator.label_studio.config import label_config
from orchestrator.label_studio.prompt_controls import add_prompt_controls
from tests.label_studio.reviewing import labeled_job, stored
from workers.embeddings.address import EmbeddingFormat, EmbeddingOf, embedding_of
from workers.embeddings.codec import encode
from workers.embeddings.store import EmbeddingStore
from workers.masks import BoolMask
from workers.models.spec import Model

SERVER = "http://label-studio"
PROJECT = 7
LS_PROJECT = LsProject(SERVER, PROJECT)
CONFIG = add_prompt_controls(label_config(["thing", "other"]), [], image_name="image")


@dataclass(frozen=True, kw_only=True)
class PublishedAsset:
    """asset_id: the owner of the masks. task_id, project: Label Studio's numbers."""

    job: Job
    asset_id: int
    uid: str
    task_id: int
    size_hw: tuple[int, int]
    project: int = PROJECT

    def body(
        self, *regions: dict[str, Any], project: int | None = None, shown: Sequence[str] = (), **task: Any
    ) -> bytes:
        """A /predict request. shown: ids of the regions of its prediction."""
        height, width = self.size_hw
        whole = {
            "id": self.task_id,
            "data": {"asset_id": self.uid, "width": width, "height": height},
            "predictions": [{"id": 1, "result": [{"id": own} for own in shown]}],
            **task,
        }
        context = {"context": {"result": list(regions)}}
        document = {
            "tasks": [whole],
            "project": f"{project or self.project}.17",
            "label_config": CONFIG,
            "params": context,
        }
        return json.dumps(document).encode()

    def point(
        self, x: float, y: float, *, own: str = "p", inside: bool = True, control: str = "click", label: str = "thing"
    ) -> dict[str, Any]:
        """A smart key point at a pixel."""
        height, width = self.size_hw
        value = {"x": 100 * x / width, "y": 100 * y / height, "width": 0.2, "labels": [label]}
        place = {"id": own, "from_name": control, "to_name": "image", "type": "keypoint", "value": value}
        return {**place, "is_positive": inside}

    def box(self, x0: float, y0: float, x1: float, y1: float, *, own: str = "b") -> dict[str, Any]:
        """A smart rectangle, in pixels."""
        height, width = self.size_hw
        value = {
            "x": 100 * x0 / width,
            "y": 100 * y0 / height,
            "width": 100 * (x1 - x0) / width,
            "height": 100 * (y1 - y0) / height,
            "rotation": 0,
            "labels": ["thing"],
        }
        return {"id": own, "from_name": "box", "to_name": "image", "type": "rectangle", "value": value}


def published_asset(
    engine: Engine,
    masks: Sequence[BoolMask],
    *,
    key: str = "a.jpg",
    task_id: int = 30,
    model: str = "stub",
    model_version: str = "stub@55555555+00000000",
    ls_project: LsProject = LS_PROJECT,
) -> PublishedAsset:
    """An asset of a job of its own with these masks, published to the project."""
    size_hw = (masks[0].shape[0], masks[0].shape[1])
    labels = ["thing"] * len(masks)
    scores = [0.9] * len(masks)
    job = labeled_job(
        engine,
        [key],
        lambda _, asset_id: stored(asset_id, masks, scores=scores, labels=labels),
        sizes_hw={key: size_hw},
        model=model,
        model_version=model_version,
    )
    uri = f"{job.source}/{key}"
    uid = asset_uid(uri)
    with engine.begin() as db:
        (asset,) = publishing.unpublished(db, job_id=job.id, ls_project=ls_project, after_asset_id=0, page=2)
        intent = Intent(
            asset_uid=uid, uri=uri, asset_id=asset.asset_id, mask_count=len(masks), left_out=0, iou_sum=1.0, iou_min=1.0
        )
        written = publishing.write_intents(
            db, ls_project=ls_project, job_id=job.id, model_version=job.model_version, intents=[intent]
        )
        publishing.mark_done(
            db, ls_project=ls_project, model_version=job.model_version, task_ids={written[uid]: task_id}
        )
    return PublishedAsset(
        job=job, asset_id=asset.asset_id, uid=uid, task_id=task_id, size_hw=size_hw, project=ls_project.project_id
    )


def keep_embedding(
    engine: Engine, store: EmbeddingStore, model: Model, asset: PublishedAsset, image: Any
) -> EmbeddingOf:
    """Store the embedding of the asset's image (H, W, 3), as a worker does."""
    of = embedding_of_asset(engine, asset)
    (embedding,) = model.embed([image])
    content = encode(embedding, of)
    store.write(of.address, content)
    with engine.begin() as db:
        embeddings.want(db, addresses={asset.asset_id: of.address})
        embeddings.record_stored(db, sizes={of.address: len(content)})
    return of


def embedding_of_asset(engine: Engine, asset: PublishedAsset) -> EmbeddingOf:
    with engine.begin() as db:
        found = embeddings.embeddable_assets(db, asset_ids=[asset.asset_id])
    return embedding_of(found[asset.asset_id], EmbeddingFormat.FP16)
