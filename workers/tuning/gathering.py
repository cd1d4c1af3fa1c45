"""An annotated asset to a lesson: its content's hash, its embedding from the store or the encoder, its targets."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from db.settings import Settings
from workers.embeddings.address import EmbeddingError, EmbeddingFault, EmbeddingFormat, EmbeddingOf
from workers.embeddings.codec import decode as decode_embedding
from workers.embeddings.codec import encode, to_device
from workers.embeddings.store import EmbeddingStore
from workers.engine.promptable import Promptable
from workers.errors import AssetError, TransientError, redact
from workers.images.decode import decode as decode_image
from workers.masks import BoolMask, decode_counts
from workers.models.files import encoder_of
from workers.models.registry import find_model
from workers.storage.source import open_source
from workers.tuning.lessons import Frame, Lesson, WrongPrompt, target_of, turned
from workers.tuning.plan import Plan, PlannedAsset, PlannedWrong, TuneError

_FIFTH = 2**32 // 5  # of the numbers that 8 hexadecimal digits can be
FEWEST_JUDGING = 2  # images with masks: the gain of one alone has no interval
_IN_MEMORY_BYTES = 1 << 30  # of embeddings; the others are read from the folder again

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """An asset that teaches or judges. number: in the plan. content: its bytes' sha256. encoded: here, just now."""

    number: int
    asset: PlannedAsset
    frame: Frame
    content: str
    encoded: bool

    def masks(self) -> list[BoolMask]:
        return [decode_counts(mask.counts, self.asset.size_hw) for mask in self.asset.masks]


class Embeddings:
    """The embeddings of a plan's assets, as files in a folder, which a later tuning of the same assets uses again."""

    def __init__(self, plan: Plan, model: Promptable, folder: Path, store: EmbeddingStore | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._plan, self._model, self._folder, self._store = plan, model, folder, store
        self._encoder, self._sha256 = encoder_of(find_model(plan.model))
        self._in_memory: dict[tuple[int, int], Tensor] = {}
        self._bytes = 0

    def has(self, number: int, view: int) -> bool:
        """Whether this embedding was brought before."""
        return self._path(self._of(self._plan.assets[number]), view).is_file()

    def bring(self, number: int, content: bytes, *, max_pixels: int, view: int = 0) -> bool:
        """Bring the embedding of an asset into the folder. content: the image. True when it was encoded here.

        view: a turned copy of the image (`lessons.turned`). The store has none.
        """
        asset = self._plan.assets[number]
        of = self._of(asset)
        path = self._path(of, view)
        if path.is_file():
            return False
        stored = self._from_store(asset, of) if view == 0 else None
        if stored is None:
            image = decode_image(content, name=asset.key, max_pixels=max_pixels)
            if image.shape[:2] != asset.size_hw:
                raise TuneError(f"{asset.key}: {image.shape[:2]} pixels (height, width), annotated as {asset.size_hw}")
            with torch.no_grad():
                [embedding] = self._model.embed([turned(image, view)], fast=self._plan.fast)
        part = path.with_suffix(".part")
        part.write_bytes(encode(embedding, of) if stored is None else stored)
        part.replace(path)
        return stored is None

    def of(self, number: int, view: int = 0) -> Tensor:
        """The embedding (1, C, h, w) of an asset that was brought, float32 on the model's device."""
        if (number, view) in self._in_memory:
            return self._in_memory[number, view]
        of = self._of(self._plan.assets[number])
        read = decode_embedding(self._path(of, view).read_bytes(), of.stamp)
        embedding: Tensor = to_device(read, str(self._model.device))
        if self._bytes + embedding.nbytes <= _IN_MEMORY_BYTES:
            self._in_memory[number, view] = embedding
            self._bytes += embedding.nbytes
        return embedding

    def _of(self, asset: PlannedAsset) -> EmbeddingOf:
        stored_as = EmbeddingFormat.FP16 if asset.embedding is None else asset.embedding.split("/")[1]
        return EmbeddingOf(
            model=self._encoder,
            weights_sha256=self._sha256,
            fast=self._plan.fast,
            format=EmbeddingFormat(stored_as),
            source=self._plan.source,
            key=asset.key,
            etag=asset.etag,
        )

    def _path(self, of: EmbeddingOf, view: int) -> Path:
        return self._folder / f"{of.address.replace('/', '-')}-{view}.safetensors"

    def _from_store(self, asset: PlannedAsset, of: EmbeddingOf) -> bytes | None:
        """The kept bytes. None when they are gone or damaged. Raises TuneError for those of another model or image."""
        if asset.embedding is None or self._store is None:
            return None
        if asset.embedding != of.address:
            raise TuneError(
                f"{asset.key}: its kept embedding is {asset.embedding}, expected {of.address}: other weights"
            )
        try:
            content = self._store.read(of.address)
            decode_embedding(content, of.stamp)
        except EmbeddingError as error:
            if error.fault is EmbeddingFault.FOREIGN:
                said = f"{asset.key}: its kept embedding is of other weights or another image: {redact(str(error))}"
                raise TuneError(f"{said}; delete it from the store") from error
            log.warning("%s is encoded here: %s", asset.key, redact(str(error)))
            return None
        return content


def gather(
    plan: Plan, model: Promptable, embeddings: Embeddings, deployment: Settings
) -> Iterator[tuple[PlannedAsset, Gathered | str]]:
    """Bring each asset of the plan. Yields the asset, with the reason where it cannot be used. Raises TuneError."""
    source = open_source(plan.source, s3_endpoint=deployment.s3_endpoint)
    for number, asset in enumerate(plan.assets):
        try:
            read = source.read_with_etag(asset.key, deployment.max_object_bytes)
            if read.etag and asset.etag and read.etag != asset.etag:
                yield asset, "its image was changed since it was labeled"
                continue
            encoded = embeddings.bring(number, read.content, max_pixels=deployment.max_pixels)
        except (AssetError, TransientError, EmbeddingError) as error:
            yield asset, redact(str(error))
            continue
        content = hashlib.sha256(read.content).hexdigest()
        frame = frame_of(model, asset.size_hw)
        yield asset, Gathered(number=number, asset=asset, frame=frame, content=content, encoded=encoded)


def frame_of(model: Promptable, size_hw: tuple[int, int]) -> Frame:
    """The frames of an image. The logits' grid covers the encoder's padded input, which is square."""
    longest = max(model.input_hw((1000, 1000)))
    grid_hw = model.low_hw
    return Frame(size_hw=size_hw, input_hw=model.input_hw(size_hw), grid_hw=grid_hw, cell_px=longest // max(grid_hw))


def lesson_of(gathered: Gathered) -> Lesson:
    """What an asset teaches. Masks without pixels are left out."""
    targets = (target_of(mask, gathered.frame) for mask in gathered.masks())
    wrong = [_in_input(one, gathered.frame) for one in gathered.asset.wrong]
    return Lesson(
        number=gathered.number, frame=gathered.frame, targets=[one for one in targets if one is not None], wrong=wrong
    )


def _in_input(wrong: PlannedWrong, frame: Frame) -> WrongPrompt:
    """A prompt in pixels of the encoder's input instead of the image's."""
    scale_x, scale_y = frame.scale_xy
    if wrong.box_xyxy is not None:
        x0, y0, x1, y1 = wrong.box_xyxy
        return WrongPrompt(box_xyxy=(x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y))
    assert wrong.point_xy is not None
    return WrongPrompt(point_xy=(wrong.point_xy[0] * scale_x, wrong.point_xy[1] * scale_y))


def hold_out(gathered: Sequence[Gathered]) -> tuple[list[Gathered], list[Gathered]]:
    """The assets that teach, and those that judge: about a fifth.

    The hash of its content puts an asset on a side, so it stays there when others come, and copies of an image are on
    the same side. Only where chance holds out fewer than two images with masks, the next hashes judge too.
    """
    able = sorted({one.content for one in gathered if one.asset.masks})
    judging = {one.content for one in gathered if int(one.content[:8], 16) < _FIFTH}
    judging.update(able[: min(FEWEST_JUDGING, len(able) // 2)])
    return [one for one in gathered if one.content not in judging], [one for one in gathered if one.content in judging]
