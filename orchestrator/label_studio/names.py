"""The names that our labeling config gives its controls."""

from __future__ import annotations

from typing import Literal

IMAGE_CONTROL = "image"
POLYGON_CONTROL = "polygon"
BRUSH_CONTROL = "brush"
RECTANGLE_CONTROL = "rectangle"
CLICK_CONTROL = "click"  # the smart controls: a person's prompts, never masks
BOX_CONTROL = "box"
PICK_CONTROL = "pick"
PROMPT_LABELS = "prompt"  # the one row of labels of the three
ANSWER_PREFIX = "assist-"  # of the ids of regions that answer a click with a new mask
DEFAULT_LABEL = "object"
RegionKind = Literal["auto", "polygon", "brush", "rectangle"]
