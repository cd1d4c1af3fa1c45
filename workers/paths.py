"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def own_path(written: str | Path) -> Path:
    """The path of this machine that a person means: `~` is their home, also in `--out=~/x`, where no shell sees it.

    A name such as `~old` that belongs to no user stays a name. pathlib's own expanduser raises for it.
    """
    return Path(os.path.expanduser(written))  # noqa: PTH111
