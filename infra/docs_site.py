"""MkDocs' hooks: pages of the repository that stand outside docs/ are part of the site too.

A link to such a page leads to its page of the site. A link to another file of the repository, such as a Helm chart,
becomes its text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "tests/benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
INSTEAD = {**OUTSIDE, "README.md": "index.md", "docs/decisions": "decisions/README.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)((?:#[^)]*)?)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead every relative link to the site's own page, or take it away."""
    place = page.file.src_uri
    source = next((name for name, inside in OUTSIDE.items() if inside == place), f"docs/{place}")

    def replaced(found: re.Match[str]) -> str:
        text, target, anchor = found.groups()
        named = os.path.normpath(Path(source).parent / target)
        inside = INSTEAD.get(named) or (named.removeprefix("docs/") if named.startswith("docs/") else None)
        if inside is None:
            return f"`{named}`" if (ROOT / named).exists() else found.group()
        return f"[{text}]({os.path.relpath(inside, Path(place).parent)}{anchor})"

    return _LINK.sub(replaced, markdown)
