"""The frame of a page that needs no server: a filled template, tiles, charts, safe text."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator.export.files import replacing

TEMPLATE = Path(__file__).with_name("gallery.html")
_BARS = 24


def fill_template(template: str, parts: Mapping[str, Iterable[str]], out: Path) -> None:
    """Write the template to `out` with each {{name}} filled. {{script_hash}} is computed from the template's script."""
    script = template.partition("<script>")[2].partition("</script>")[0]
    script_hash = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    with replacing(out) as file:
        # The text that fills one gap is never searched for other gaps.
        for n, piece in enumerate(re.split(r"\{\{(\w+)\}\}", template)):
            file.writelines([piece] if n % 2 == 0 else [script_hash] if piece == "script_hash" else parts[piece])


def tile(name: str, number: str, css_class: str = "") -> str:
    return f'<div class="{css_class}"><dt>{safe_text(name)}</dt><dd>{number}</dd></div>'


def chart(title: str, numbers: Mapping[int, int], unit: str, form: str, *, step: float) -> str:
    """A histogram with at most _BARS bars, from the smallest value to the largest."""
    if not numbers:
        return f"<figure><figcaption>{title}</figcaption><p class='quiet'>none</p></figure>"
    low = min(numbers)
    width = -(-(max(numbers) - low + 1) // _BARS)
    bars = [0] * ((max(numbers) - low) // width + 1)
    for value, number in numbers.items():
        bars[(value - low) // width] += number
    # With few values the bars keep their width and stand on the left.
    columns = max(len(bars), 6)
    drawn = [
        f'<rect x="{i + 0.08:g}" y="{100 - height:.1f}" width="0.84" height="{height:.1f}">'
        f"<title>{form.format((low + i * width) * step)}: {counted(number, unit)}</title></rect>"
        for i, number in enumerate(bars)
        if (height := max(2.0, 100 * number / max(bars)) if number else 0)
    ]
    ends = "".join(f"<span>{form.format(value * step)}</span>" for value in sorted({low, max(numbers)}))
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {columns} 100" role="img" '
        f'preserveAspectRatio="none" aria-label="{title}: histogram">{"".join(drawn)}</svg>'
        f'<div class="ends" style="width:{100 * len(bars) / columns:.1f}%" aria-hidden="true">{ends}</div></figure>'
    )


def counted(number: int, unit: str) -> str:
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}<small> s</small>"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}<small> h</small> {minutes}<small> min</small>"
    return f"{minutes}<small> min</small> {rest}<small> s</small>"


# Invisible characters that change the direction of the text or break the line.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def safe_text(text: str) -> str:
    """Escape for HTML text and quoted attributes. An invisible character is shown as its code."""
    return html.escape(_UNSEEN.sub(_visible, text), quote=True)


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    # Unicode's control pictures, such as ␊.
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"
