"""From a prompt to the decoder's mask: the asset's stored embedding, and the child process that reads it."""

from __future__ import annotations

import itertools
import logging

from db import embeddings
from db.clicks import ClickedTask
from db.session import Engine
from db.states import EmbeddingState
from orchestrator.assist.children import Children
from workers.clicks.messages import ClickRequest
from workers.embeddings.address import EmbeddingFormat, Stamp, embedding_of
from workers.masks import Mask
from workers.models.spec import ModelError
from workers.prompts import Prompt

log = logging.getLogger(__name__)


class Decoder:
    """Answers prompts from stored embeddings, with the model that labeled the asset. Thread-safe.

    An embedding that is absent is wanted from now on, so that a later click finds it.
    """

    def __init__(self, engine: Engine, children: Children, embedding_format: EmbeddingFormat) -> None:
        self._engine = engine
        self._children = children
        self._format = embedding_format
        self._numbers = itertools.count(1)

    def __call__(self, task: ClickedTask, prompt: Prompt, mask_counts: str | None) -> Mask | None:
        """The mask, or None: the embedding is not there yet, or no child answers. mask_counts: of a mask to refine."""
        stored = self._stored(task.asset_id)
        if stored is None:
            return None
        stamp, decoder = stored
        request = ClickRequest(
            n=next(self._numbers),
            stamp=stamp,
            size_hw=task.size_hw,
            prompt=prompt,
            mask_counts=mask_counts,
            decoder=decoder,
        )
        answer = self._children.ask(request, route=task.asset_id)
        if answer is None:
            return None
        if answer.missing is not None:
            log.warning("asset %d: its embedding is made again: %s", task.asset_id, answer.missing)
            with self._engine.begin() as db:
                embeddings.want_again(db, address=stamp.address)
        if answer.error is not None:
            log.warning("asset %d: the decoder gave no mask: %s", task.asset_id, answer.error)
        if answer.mask is None:
            return None
        return Mask(
            counts=answer.mask.counts,
            size_hw=task.size_hw,
            bbox_xywh=answer.mask.bbox_xywh,
            area_px=answer.mask.area_px,
            predicted_iou=answer.mask.predicted_iou,
        )

    def _stored(self, asset_id: int) -> tuple[Stamp, str] | None:
        """The stamp of the asset's embedding if it is stored, and the model that labeled the asset.

        Marks the embedding as used now, or as wanted.
        """
        try:
            with self._engine.begin() as db:
                asset = embeddings.embeddable_assets(db, asset_ids=[asset_id]).get(asset_id)
                if asset is None:
                    return None
                wanted = embedding_of(asset, self._format)
                states = embeddings.want(db, addresses={asset_id: wanted.address})
        except ModelError as error:
            log.info("asset %d: only its stored masks answer: %s", asset_id, error)
            return None
        return (wanted.stamp, asset.model) if states[wanted.address] is EmbeddingState.STORED else None
