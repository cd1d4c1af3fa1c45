"""How a job's images are encoded, and how their masks are found: everything, by prompts, or by a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from db import prompts as stored_prompts
from db.leases import Asset, ClaimedChunk
from workers.classifiers.asked import BACKGROUND
from workers.classifiers.asked import asked_of_json as asked_classifier_of_json
from workers.classifiers.classifier import load_classifier
from workers.detectors.detector import (
    Asked,
    AskedDetector,
    Detection,
    Detector,
    PhraseDetector,
    asked_of_json,
    boxes_of_phrases,
    prompts_of,
)
from workers.errors import AssetError, ErrorKind
from workers.images.pixels import RgbImage
from workers.masks import Mask
from workers.models.files import require_same_weights
from workers.models.own import require_same_model
from workers.models.registry import find_model
from workers.models.spec import Model, ModelSpec
from workers.params import PromptParams, automatic_params
from workers.prompts import Prompt, PromptError, fit_all
from workers.running.outcomes import Found, list_unused
from workers.running.worker import Draining, Worker, loading

_PROMPTS_A_CALL = 256  # the heartbeat is told after each call: ten thousand prompts on one asset take minutes

Encode = Callable[[Sequence[RgbImage]], list[Any]]
"""Encodes a batch of images. Returns for each image what `Look` needs: at least the model's embedding."""
Look = Callable[[Asset, RgbImage, Any], Found]
"""Finds an asset's masks, from its image and from the result of `Encode` for it."""
AskedOf = Callable[[Asset], Sequence[Any]]
"""Gives the prompts of an asset, as they are stored."""


def encode_and_look(worker: Worker, chunk: ClaimedChunk, go_on: Callable[[], None]) -> tuple[Encode, Look]:
    """The two functions that encode this chunk's images and find their masks. Loads the models they need.

    go_on: called between parts of long work. It raises when the chunk's lease was lost.
    """
    with loading(worker, chunk, chunk.model):
        _require_model(worker, chunk, go_on)
        model = worker.load_model(chunk.model)
    asked_of = _asked_of(worker, chunk)
    detector_json = chunk.asked.get("detector")
    if detector_json is None and asked_of is None:
        is_fast = chunk.asked.get("params", {}).get("precision") == "fast"
        return partial(model.embed, fast=is_fast), _classified(worker, chunk, go_on, _automatic_look(model, chunk))
    asking = _Asking(model=model, params=PromptParams(**chunk.asked.get("params", {})), go_on=go_on)
    if detector_json is None:
        return model.embed, _prompted_look(asking, cast(AskedOf, asked_of))
    asked = asked_of_json(detector_json)
    with loading(worker, chunk, f"detector {asked.name}"):
        detector = worker.load_detector(asked)
    if asked_of is None:
        return _detecting(model, cast(Detector, detector), asked), _detected_look(asking, asked)
    phrases = _Phrases(detector=cast(PhraseDetector, detector), threshold=asked.threshold)
    return model.embed, _prompted_look(replace(asking, phrases=phrases), asked_of)


def _require_model(worker: Worker, chunk: ClaimedChunk, go_on: Callable[[], None]) -> None:
    """Bring the job's model if it is absent and a mirror is set. Raises WeightsError when another one is here."""

    def check(spec: ModelSpec) -> None:
        require_same_model(spec, chunk.asked.get("own_model"))
        require_same_weights(spec, chunk.model_version)

    def still_wanted(*_: int) -> None:
        go_on()
        if worker.draining():
            raise Draining

    if worker.settings.weights_mirror is not None:
        from workers.models.pulling import Bringing, bring_for_job  # here, because it loads an HTTP client

        bring_for_job(chunk.model, check, Bringing(progress=still_wanted, while_waiting=still_wanted, is_public=False))
    check(find_model(chunk.model))


def _asked_of(worker: Worker, chunk: ClaimedChunk) -> AskedOf | None:
    """Where an asset's prompts are: in the database, or the same phrases for all; None for a job without."""
    text = chunk.asked.get("text")
    if not chunk.asked.get("prompts"):
        return (lambda asset: text) if text else None

    def stored(asset: Asset) -> Sequence[Any]:
        with worker.engine.begin() as db:
            return stored_prompts.prompts_of(db, asset_id=asset.id)

    return stored


def _automatic_look(model: Model, chunk: ClaimedChunk) -> Look:
    params = automatic_params(find_model(chunk.model).defaults, chunk.asked.get("params", {}))
    return lambda asset, image, embedding: Found(masks=model.automatic(image, embedding, params))


def _classified(worker: Worker, chunk: ClaimedChunk, go_on: Callable[[], None], look: Look) -> Look:
    """The same masks, named by the job's classifier. `look` itself for a job without one."""
    stored = chunk.asked.get("classify")
    if stored is None:
        return look
    asked = asked_classifier_of_json(stored)
    with loading(worker, chunk, f"classifier {asked.name}"):
        classifier = load_classifier(asked)

    def classified(asset: Asset, image: RgbImage, embedding: Any) -> Found:
        found = look(asset, image, embedding)
        named = [
            replace(
                mask,
                label=best.word if best.word != BACKGROUND and best.score >= asked.threshold else None,
                # Its point stays: a person's deletion teaches that the point is wrong (`maskfleet tune`).
                prompt={**(mask.prompt or {}), "class": best.word, "score": round(best.score, 4)},
            )
            for mask, best in classifier.classify(image, found.masks, go_on)
        ]
        return replace(found, masks=named)

    return classified


def _prompted_look(asking: _Asking, asked_of: AskedOf) -> Look:
    def look(asset: Asset, image: RgbImage, embedding: Any) -> Found:
        asked = asked_of(asset)
        height, width = image.shape[:2]
        usable, wrong = fit_all(asked, (width, height))
        prompts = [(prompt, {"index": index, **asked[index]}) for index, prompt in usable.items()]
        try:
            masks, lost = asking.answer(image, embedding, prompts)
        except PromptError:
            masks, lost, unreadable = asking.answer_one_by_one(image, embedding, prompts)
            wrong += unreadable
        if len(wrong) == len(asked):
            raise AssetError(ErrorKind.BAD_PROMPT, f"{asset.key}: {list_unused(wrong, len(asked), 'prompts')}")
        unused = [list_unused(wrong, len(asked), "prompts")] if wrong else []
        unused += [list_unused(lost, None, "boxes")] if lost else []
        return Found(masks=masks, unused="; ".join(unused) or None)

    return look


def _detected_look(asking: _Asking, asked: AskedDetector) -> Look:
    def look(asset: Asset, image: RgbImage, detected: _Detected) -> Found:
        height, width = image.shape[:2]
        prompts, wrong = prompts_of(detected.boxes, asked, (width, height))
        masks = asking.ask(image, detected.embedding, prompts)
        return Found(masks=masks, unused=list_unused(wrong, len(detected.boxes), "boxes") if wrong else None)

    return look


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asking:
    """Asks prompts of a model. phrases: finds boxes for text prompts, when the model takes no text."""

    model: Model
    params: PromptParams
    go_on: Callable[[], None]
    phrases: _Phrases | None = None

    def answer(self, image: RgbImage, embedding: Any, prompts: Sequence[Asked]) -> tuple[list[Mask], list[str]]:
        """The masks of prompts, and a reason for each found box that cannot be used. Raises PromptError."""
        lost: list[str] = []
        if self.phrases is not None:
            prompts, lost = self.phrases.box(image, prompts)
        return self.ask(image, embedding, prompts), lost

    def answer_one_by_one(
        self, image: RgbImage, embedding: Any, prompts: Sequence[Asked]
    ) -> tuple[list[Mask], list[str], list[str]]:
        """The same, prompt by prompt, and a reason for each prompt that cannot be read, such as a too long text."""
        masks: list[Mask] = []
        lost: list[str] = []
        unreadable: list[str] = []
        for prompt, row in prompts:
            try:
                some = self.answer(image, embedding, [(prompt, row)])
            except PromptError as error:
                unreadable.append(f"prompt {row['index']}: {error}")
                continue
            masks += some[0]
            lost += some[1]
        return masks, lost, unreadable

    def ask(self, image: RgbImage, embedding: Any, prompts: Sequence[Asked]) -> list[Mask]:
        """The masks of any number of prompts. The heartbeat is told after every _PROMPTS_A_CALL prompts."""
        masks: list[Mask] = []
        for some in _slices(prompts, _PROMPTS_A_CALL):
            found = self.model.prompted(image, embedding, [prompt for prompt, _ in some], self.params)
            for (prompt, asked), answers in zip(some, found, strict=True):
                masks += [_of_prompt(mask, prompt, asked) for mask in answers]
            self.go_on()
        return masks


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phrases:
    """A job's detector that finds boxes for phrases."""

    detector: PhraseDetector
    threshold: float

    def box(self, image: RgbImage, prompts: Sequence[Asked]) -> tuple[list[Asked], list[str]]:
        return boxes_of_phrases(self.detector, image, prompts, self.threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Detected:
    """The boxes that a detector found in an image, and the image's embedding. It is None when no box was found."""

    boxes: Sequence[Detection]
    embedding: Any


def model_embedding(encoded: Any) -> Any:
    """The model's embedding in what `Encode` returned for an image. None when the image was not encoded."""
    return encoded.embedding if isinstance(encoded, _Detected) else encoded


def _detecting(model: Model, detector: Detector, asked: AskedDetector) -> Encode:
    """Runs the detector first. The model then encodes only the images that have a box."""

    def encode(images: Sequence[RgbImage]) -> list[_Detected]:
        found = [
            [box for box in boxes if asked.keeps(box.class_name)]
            for boxes in detector.detect(images, threshold=asked.threshold)
        ]
        boxed = [image for image, boxes in zip(images, found, strict=True) if boxes]
        embeddings = iter(model.embed(boxed) if boxed else [])
        return [_Detected(boxes=boxes, embedding=next(embeddings) if boxes else None) for boxes in found]

    return encode


def _of_prompt(mask: Mask, prompt: Prompt, asked: dict[str, Any]) -> Mask:
    return replace(mask, label=mask.label or prompt.label or prompt.text, prompt=asked)


def _slices(prompts: Sequence[Asked], size: int) -> list[Sequence[Asked]]:
    return [prompts[k : k + size] for k in range(0, len(prompts), size)]
