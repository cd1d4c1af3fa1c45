"""One colour a label, the same in Label Studio, the gallery and the exports, whatever the other labels are."""

from __future__ import annotations

import colorsys
import hashlib

# Middle lightness only: readable on white paper and over a dark photo.
_LIGHTNESS = (0.42, 0.5, 0.58)
_SATURATION = (0.65, 0.8, 0.95)


def label_colour(label: str) -> str:
    """The label's colour as #rrggbb, drawn from the label's own bytes."""
    digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).digest()
    hue = int.from_bytes(digest[:2], "big") / 65536
    rgb = colorsys.hls_to_rgb(hue, _LIGHTNESS[digest[2] % 3], _SATURATION[digest[3] % 3])
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)
