"""Remembers the last box that was drawn for each task and label.

Label Studio's editor never sends a box and points in one request: it groups prompts by their kind. So points that
follow a box are joined with it here, until they are of another object. A wrong guess costs a wrong suggestion, and
stores nothing.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestrator.assist.asked import Asked, BoxPrompt, PointPrompt
from orchestrator.label_studio.names import PICK_CONTROL

REMEMBERED_SECONDS = 120.0
_MOST = 10_000
_MARGIN = 0.25  # of the box's sides: a click inside an object may lie so far outside a box that was drawn too small

_Key = tuple[int, int, str | None]


@dataclass(frozen=True, slots=True)
class _Remembered:
    """answer_id: of the region that answered it last."""

    box: BoxPrompt
    drawn_at: float
    answer_id: str | None = None


class Boxes:
    """The remembered boxes, at most _MOST. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._boxes: OrderedDict[_Key, _Remembered] = OrderedDict()
        self._lock = threading.Lock()

    def join(self, asked: Asked) -> Asked:
        """Remember the request's box. Without one, add the box that its clicks follow."""
        key = (asked.project_id, asked.task_id, asked.label)
        with self._lock:
            if asked.box is not None:
                self._boxes.pop(key, None)
                self._boxes[key] = _Remembered(asked.box, self._clock())
                if len(self._boxes) > _MOST:
                    self._boxes.popitem(last=False)
                return asked
            remembered = self._boxes.get(key)
            if remembered is None or any(point.control == PICK_CONTROL for point in asked.points):
                return asked
            if self._is_over(remembered, asked):
                del self._boxes[key]
                return asked
            return replace(asked, box=remembered.box)

    def answered(self, asked: Asked, region_id: str) -> None:
        """Tell which region answered a joined request. A reviewer who has it in the task has accepted it."""
        key = (asked.project_id, asked.task_id, asked.label)
        with self._lock:
            remembered = self._boxes.get(key)
            if remembered is not None and remembered.box == asked.box:
                self._boxes[key] = replace(remembered, answer_id=region_id)

    def _is_over(self, remembered: _Remembered, asked: Asked) -> bool:
        """Whether the box is too old, its answer was accepted, the newest click is of another object, or a newer draft
        with these points no longer has it.
        """
        if self._clock() - remembered.drawn_at > REMEMBERED_SECONDS or remembered.answer_id in asked.shown_ids:
            return True
        if asked.points[-1].inside and not _is_near(asked.points[-1], remembered.box):
            return True
        draft_has_points = any(point.id in asked.draft_ids for point in asked.points)
        return draft_has_points and remembered.box.id not in asked.draft_ids


def _is_near(point: PointPrompt, box: BoxPrompt) -> bool:
    x0, y0, x1, y1 = box.box_xyxy
    wide, high = _MARGIN * (x1 - x0), _MARGIN * (y1 - y0)
    return x0 - wide <= point.x <= x1 + wide and y0 - high <= point.y <= y1 + high
