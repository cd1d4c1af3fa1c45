"""Turned and mirrored copies of the images that teach: with few images the decoder then learns about twice as much.

An embedding cannot be turned, for an encoder knows where up is. So each copy is encoded, while a quarter of the
training's time lasts. (8 images of nuclei, 150 CPU s: click +0.065 with copies, +0.045 without; 2026-11-26.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from db.settings import Settings
from workers.embeddings.address import EmbeddingError
from workers.engine.promptable import Promptable
from workers.errors import AssetError, TransientError
from workers.storage.source import open_source
from workers.tuning.gathering import Embeddings, Gathered, frame_of
from workers.tuning.lessons import Lesson, target_of, turned
from workers.tuning.plan import Plan

# The mirrored image comes first: photographs are rarely upside down.
COPIES = (4, 2, 6, 1, 3, 5, 7)
_SHARE = 0.25  # of the training's seconds, for encoding copies


def copies(
    plan: Plan,
    model: Promptable,
    embeddings: Embeddings,
    teaching: Sequence[Gathered],
    deployment: Settings,
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[int, int], None] = lambda done, of: None,
) -> list[Lesson]:
    """Lessons from copies of these assets. New copies are encoded until a part of `seconds` is over.

    say: called with how many copies are done, and how many there may be.
    """
    source = open_source(plan.source, s3_endpoint=deployment.s3_endpoint)
    lessons: list[Lesson] = []
    began = clock()
    for place, view in enumerate(COPIES):
        for row, one in enumerate(teaching):
            is_there = embeddings.has(one.number, view)
            if not is_there and clock() - began > _SHARE * seconds:
                return lessons
            try:
                if not is_there:
                    content = source.read(one.asset.key, deployment.max_object_bytes)
                    embeddings.bring(one.number, content, max_pixels=deployment.max_pixels, view=view)
            except (AssetError, TransientError, EmbeddingError):
                continue  # it was read before; a copy less is no harm
            lessons.append(_lesson_of_copy(one, model, view))
            say(place * len(teaching) + row + 1, len(COPIES) * len(teaching))
    return lessons


def _lesson_of_copy(one: Gathered, model: Promptable, view: int) -> Lesson:
    """What a copy teaches. The prompts of deleted masks are left to the image itself."""
    height, width = one.asset.size_hw
    frame = frame_of(model, (height, width) if view % 2 == 0 else (width, height))
    targets = (target_of(turned(mask, view), frame) for mask in one.masks())
    return Lesson(number=one.number, view=view, frame=frame, targets=[t for t in targets if t is not None])
