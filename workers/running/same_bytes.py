"""`--dedupe content`: before the model looks, the assets whose bytes it has seen already are answered.

By the listed etag before they are read, and by a hash of what was read. Of a batch, the first with some bytes is looked
at, and the others get its masks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from db import same_bytes
from db.leases import Asset, ClaimedChunk, NewOutcome
from db.same_bytes import ReadBytes
from db.session import Connection
from workers.images.pixels import RgbImage
from workers.running.fetching import BytesKeys, FetchAhead
from workers.running.worker import Worker

_MOST_REMEMBERED = 256  # outcomes of a chunk, with their masks

Images = list[tuple[Asset, RgbImage]]


def is_deduped(chunk: ClaimedChunk) -> bool:
    return chunk.asked.get("dedupe") == "content"


def answer_by_etag(db: Connection, chunk: ClaimedChunk, assets: Sequence[Asset], *, lease_seconds: float) -> set[int]:
    """Answer assets that need not be read, because their etag says which bytes they have. Returns which."""
    keys = {
        asset.id: same_bytes.key_of_etag(asset.etag, asset.size_bytes, model_version=chunk.model_version)
        for asset in assets
    }
    read = {asset_id: ReadBytes(keys=[key]) for asset_id, key in keys.items() if key is not None}
    return same_bytes.answer_same_bytes(db, chunk=chunk, read=read, lease_seconds=lease_seconds) if read else set()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Twin:
    """An asset with the bytes of another one of this chunk, whose outcome may not be stored yet."""

    asset_id: int
    key: str


class SameBytes:
    """What one chunk has seen. answered: how many assets were answered from the database."""

    def __init__(self, worker: Worker, chunk: ClaimedChunk) -> None:
        self.answered = 0
        self._worker, self._chunk = worker, chunk
        self._keys: dict[int, BytesKeys] = {}
        self._outcomes: OrderedDict[str, NewOutcome] = OrderedDict()
        self._twins: list[_Twin] = []

    def keys_of(self, content: bytes) -> BytesKeys:
        """Called while an asset is read, in another thread."""
        return same_bytes.keys_of(content, model_version=self._chunk.model_version)

    def first_looks(self, images: Images, ahead: FetchAhead) -> Images:
        """Those of a batch's images that the model has to look at."""
        for asset, _ in images:
            self._keys[asset.id] = ahead.bytes_keys(asset)
        unknown = [(asset, image) for asset, image in images if not self._is_twin(asset)]
        with self._worker.engine.begin() as db:
            answered = same_bytes.answer_same_bytes(
                db,
                chunk=self._chunk,
                read={a.id: ReadBytes(keys=self._keys[a.id], etag=ahead.changed_etag(a)) for a, _ in unknown},
                lease_seconds=self._worker.settings.lease_seconds,
            )
        self.answered += len(answered)
        first: Images = []
        seen: set[str] = set()
        for asset, image in unknown:
            key = self._keys[asset.id][0]
            if asset.id in answered:
                continue
            if key in seen:
                self._twins.append(_Twin(asset_id=asset.id, key=key))
            else:
                seen.add(key)
                first.append((asset, image))
        return first

    def _is_twin(self, asset: Asset) -> bool:
        key = self._keys[asset.id][0]
        if key in self._outcomes:
            self._twins.append(_Twin(asset_id=asset.id, key=key))
        return key in self._outcomes

    def with_twins(self, outcomes: Sequence[NewOutcome]) -> list[NewOutcome]:
        """The outcomes of a batch with their keys, and those of the assets that have the same bytes."""
        known = [self._keyed(outcome) for outcome in outcomes]
        twins = [self._of_twin(twin) for twin in self._twins]
        self._twins.clear()
        while len(self._outcomes) > _MOST_REMEMBERED:
            self._outcomes.popitem(last=False)
        return [*known, *twins]

    def _keyed(self, outcome: NewOutcome) -> NewOutcome:
        keys = self._keys.pop(outcome.asset_id, None)
        if keys is None:
            return outcome
        keyed = replace(outcome, bytes_keys=keys) if outcome.error_kind is None else outcome
        self._outcomes[keys[0]] = keyed
        return keyed

    def _of_twin(self, twin: _Twin) -> NewOutcome:
        first = self._outcomes[twin.key]
        self._keys.pop(twin.asset_id, None)
        own = replace(first, asset_id=twin.asset_id, etag=None, segment_ms=None)
        if first.error_kind is not None:
            return replace(own, error=f"its bytes are those of another asset: {first.error}"[:2000])
        masks = [replace(mask, asset_id=twin.asset_id) for mask in first.masks]
        return replace(own, answered_by=first.asset_id, masks=masks)
