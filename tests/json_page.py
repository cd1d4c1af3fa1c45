"""docs/json.md as tests read it: the top-level keys of each command's document."""

from __future__ import annotations

import re
from pathlib import Path

_PAGE = (Path(__file__).parents[1] / "docs" / "json.md").read_text()


def documented_keys(command: str) -> set[str]:
    """The keys that the page's section on this command names."""
    [section] = [part for part in _PAGE.split("\n## ")[1:] if f"`maskfleet {command} --json`" in part.splitlines()[0]]
    heads = re.findall(r"^- ((?:`\w+`(?:, )?)+)", section, re.MULTILINE)
    return {key for head in heads for key in re.findall(r"`(\w+)`", head)}
