"""Pictures of every format, and their headers."""

from __future__ import annotations

from tests.fuzz.target import Target, files
from workers.errors import AssetError
from workers.images.decode import decode

TARGETS = [
    Target(
        name="images",
        read=lambda data: decode(data, name="a.jpg", max_pixels=2_000_000),
        allowed=(AssetError,),
        seeds=lambda: [*files("nasty/files"), *files("photos_plain", "**/*.jpg")],
    )
]
