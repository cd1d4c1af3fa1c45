"""One colour for each label: the same in Label Studio, the gallery and the exports, independent of other labels."""

from __future__ import annotations

import colorsys
import hashlib

_LIGHTNESS = (0.42, 0.5, 0.58)
_SATURATION = (0.65, 0.8, 0.95)
# Yellow and green are bright. Darkened to this luminance they are still readable as text on white.
_MAX_LUMINANCE = 0.4


def label_colour(label: str) -> str:
    """The label's colour as #rrggbb, computed from the label's own bytes."""
    digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).digest()
    hue = int.from_bytes(digest[:2], "big") / 65536
    red, green, blue = colorsys.hls_to_rgb(hue, _LIGHTNESS[digest[2] % 3], _SATURATION[digest[3] % 3])
    # sRGB's luminance weights, with an exponent of 2.2 for its curve.
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    dim = min(1.0, (_MAX_LUMINANCE / luminance) ** (1 / 2.2))
    return "#" + "".join(f"{round(255 * dim * channel):02x}" for channel in (red, green, blue))
