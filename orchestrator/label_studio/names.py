"""The names that our labeling config gives its controls."""

from __future__ import annotations

from typing import Literal

IMAGE_CONTROL = "image"
POLYGON_CONTROL = "polygon"
BRUSH_CONTROL = "brush"
RECTANGLE_CONTROL = "rectangle"
DEFAULT_LABEL = "object"
RegionKind = Literal["auto", "polygon", "brush", "rectangle"]
