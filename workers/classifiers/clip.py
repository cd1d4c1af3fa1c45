"""CLIP and SigLIP through transformers: a mask's crop is compared with the job's words.

A crop is a square around the mask. It is seen twice, with its background and with grey in its place, and the two
embeddings are averaged. The background shows what an object is; without it, a neighbour cannot give its name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize, resize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from workers.classifiers.asked import BACKGROUND, AskedClassifier, Classified, ClassifierError
from workers.images.pixels import RgbImage
from workers.machine import pinned_device
from workers.masks import Mask, decode_counts
from workers.models.transformers_checkpoints import LOADING_ERRORS, load_whole, require_numbers

_MASKS_AT_ONCE = 16  # two crops each
_MARGIN = 1.2  # of the crop's side to the longer side of the mask's box
_MOST_SIDE_PX = 4096  # of a crop; a mask may be as long as the image, and the square of 100,000 pixels has 40 GB
_TEMPLATE = "a photo of a {}"  # as in the authors' zero-shot classification

_loaded: dict[tuple[str, str], _Checkpoint] = {}
_loading = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checkpoint:
    """mean, std: of the input's pixels, RGB, 0..1."""

    model: Any
    tokenizer: Any
    mean: list[float]
    std: list[float]
    device: str

    @property
    def side_px(self) -> int:
        return int(self.model.config.vision_config.image_size)


class ClipClassifier:
    """A checkpoint and the words of a job."""

    def __init__(self, checkpoint: _Checkpoint, asked: AskedClassifier) -> None:
        self._checkpoint = checkpoint
        self._words = (*asked.words, BACKGROUND)
        self._text = _embed_words(checkpoint, asked.name, self._words)
        self._fill = np.array([round(255 * value) for value in checkpoint.mean], np.uint8)

    def classify(
        self, image: RgbImage, masks: Sequence[Mask], go_on: Callable[[], None]
    ) -> Iterator[tuple[Mask, Classified]]:
        for first in range(0, len(masks), _MASKS_AT_ONCE):
            some = masks[first : first + _MASKS_AT_ONCE]
            scores, best = self._scores(image, some).max(dim=1)
            for mask, score, number in zip(some, scores.tolist(), best.tolist(), strict=True):
                yield mask, Classified(word=self._words[number], score=score)
            go_on()

    def _scores(self, image: RgbImage, masks: Sequence[Mask]) -> Tensor:
        """(masks, words): the softmax of each mask over the words."""
        crops = torch.stack([crop for mask in masks for crop in self._crops(image, mask)])
        pixels = normalize(crops.to(self._checkpoint.device) / 255, self._checkpoint.mean, self._checkpoint.std)
        with torch.inference_mode():
            seen = F.normalize(_features(self._checkpoint.model.get_image_features(pixel_values=pixels)), dim=-1)
            averaged = F.normalize(seen.view(len(masks), 2, -1).mean(dim=1), dim=-1)
            logits: Tensor = self._checkpoint.model.logit_scale.exp() * averaged @ self._text.T
        require_numbers(logits)
        return logits.softmax(dim=-1).cpu()

    def _crops(self, image: RgbImage, mask: Mask) -> Iterator[Tensor]:
        """The mask's square with and without its background: (3, side_px, side_px) uint8 each."""
        square, inside = square_around(image, mask, self._fill)
        side = [self._checkpoint.side_px] * 2
        for pixels in (square, np.where(inside[..., None], square, self._fill)):
            yield resize(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1), side, antialias=True)


def square_around(image: RgbImage, mask: Mask, fill: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A square of the image around a mask, and the mask in it. What lies outside the image has the colour `fill`.

    Of a square with a side of more than _MOST_SIDE_PX pixels, every second, third, … row and column is taken.
    """
    x, y, width, height = mask.bbox_xywh
    side = max(int(np.ceil(max(width, height) * _MARGIN)), 1)
    left, top = int(x + width / 2 - side / 2), int(y + height / 2 - side / 2)
    step = -(-side // _MOST_SIDE_PX)
    taken = -(-side // step)
    square = np.broadcast_to(fill, (taken, taken, 3)).copy()
    inside = np.zeros((taken, taken), np.bool_)
    (rows, down), (columns, across) = (
        _overlap(start, side, step, size) for start, size in zip((top, left), image.shape, strict=False)
    )
    square[down, across] = image[rows, columns]
    inside[down, across] = decode_counts(mask.counts, mask.size_hw)[rows, columns]
    return square, inside


def _overlap(start: int, side: int, step: int, size: int) -> tuple[slice, slice]:
    """Along one axis, where a square from `start` on lies over an image of `size`: (in the image, in the square)."""
    outside = max(0, -(start // step))  # places of the square before the image's first pixel
    in_image = slice(start + outside * step, min(start + side, size), step)
    return in_image, slice(outside, outside + len(range(in_image.start, in_image.stop, step)))


def load(asked: AskedClassifier, path: Path | None) -> ClipClassifier:
    """The checkpoint in this folder, or, when path is None, the job's commit of it on the hub: float32, frozen.

    Only safetensors are read, and no code from a checkpoint is run. Raises ClassifierError when it cannot be loaded or
    a word is too long for it.
    """
    key = (asked.name, asked.identity)
    with _loading:
        if key not in _loaded:
            _loaded[key] = _load(asked, path)
    return ClipClassifier(_loaded[key], asked)


def _load(asked: AskedClassifier, path: Path | None) -> _Checkpoint:
    where = asked.name if path is None else str(path)
    revision = asked.identity.removeprefix("commit:")
    how: dict[str, Any] = {"revision": revision} if path is None else {"local_files_only": True}
    try:
        pictures = AutoImageProcessor.from_pretrained(where, trust_remote_code=False, **how)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **how)
        model = load_whole(AutoModel, where, how)
        mean, std = ([float(value) for value in values] for values in (pictures.image_mean, pictures.image_std))
        device = pinned_device()
        checkpoint = _Checkpoint(
            model=model.to(device).eval().requires_grad_(False), tokenizer=tokenizer, mean=mean, std=std, device=device
        )
        _ = checkpoint.side_px, model.logit_scale
    except LOADING_ERRORS as error:
        raise ClassifierError(f"classifier {where}: transformers cannot load it: {error}") from error
    return checkpoint


def _embed_words(checkpoint: _Checkpoint, name: str, words: Sequence[str]) -> Tensor:
    """(words, channels), of length 1 each."""
    most = int(checkpoint.model.config.text_config.max_position_embeddings)
    texts = [_TEMPLATE.format(word) for word in words]
    for word, text in zip(words, texts, strict=True):
        if (tokens := len(checkpoint.tokenizer(text)["input_ids"])) > most:
            raise ClassifierError(f"classifier {name}: {word!r} is {tokens} tokens long, expected at most {most}")
    # SigLIP was trained with texts of full length. CLIP leaves out what follows its last token.
    tokens = checkpoint.tokenizer(texts, padding="max_length", max_length=most, return_tensors="pt")
    given = {
        key: value.to(checkpoint.device) for key, value in tokens.items() if key in ("input_ids", "attention_mask")
    }
    if checkpoint.model.config.model_type == "siglip":
        given.pop("attention_mask", None)  # its authors' model attends to the padding
    with torch.inference_mode():
        return F.normalize(_features(checkpoint.model.get_text_features(**given)), dim=-1)


def _features(found: Any) -> Tensor:
    """transformers 5 returns them inside of an output, older ones bare."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features.float()
