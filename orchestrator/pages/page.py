"""The frame of a page that needs no server: its head, tiles, charts, safe text."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

from orchestrator.export.files import replacing

HERE = Path(__file__).parent
_BARS = 24
_FEW_BARS = 6  # with fewer, bars keep their width and stand on the left


def fill_page(kind: str, parts: Mapping[str, Iterable[str]], out: Path) -> None:
    """Write head.html and KIND.html to `out`, with style.css and KIND.css inside, and each {{name}} filled.

    The page's policy allows the script of KIND.html, known by its hash, and nothing else.
    """
    body = (HERE / f"{kind}.html").read_text(encoding="utf-8")
    script = body.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    given = {
        **parts,
        "logo": [(HERE / "logo.svg").read_text(encoding="utf-8")],
        "kind": [f" · {kind}"],
        "style": [(HERE / name).read_text(encoding="utf-8") for name in ("style.css", f"{kind}.css")],
        "script_source": [f"'sha256-{digest}'" if script else "'none'"],
    }
    template = f"{(HERE / 'head.html').read_text(encoding='utf-8')}{body}</body>\n</html>\n"
    with replacing(out) as file:
        file.writelines(filled(template, given))


def filled(template: str, parts: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """The template's text with each {{name}} filled. The text that fills one gap is never searched for other gaps."""
    for n, piece in enumerate(re.split(r"\{\{(\w+)\}\}", template)):
        yield from [piece] if n % 2 == 0 else parts[piece]


def tile(name: str, number: str, css_class: str = "") -> str:
    return f'<div class="{css_class}"><dt>{safe_text(name)}</dt><dd>{number}</dd></div>'


def fact(name: str, value: str) -> str:
    return f"<div><dt>{name}</dt><dd><code>{safe_text(value)}</code></dd></div>"


def share_bar(shares: Mapping[str, int], total: int) -> str:
    """A bar of `total`, with a part for each CSS class. A part that is not 0 is seen, however small it is."""
    at, parts = 0.0, []
    for css_class, number in shares.items():
        if number:
            width = max(0.7, 100 * number / max(total, 1))
            parts.append(f'<rect class="{css_class}" x="{at:.2f}" width="{width:.2f}" height="1"/>')
            at += width
    return (
        f'<svg class="share" viewBox="0 0 {max(100.0, at):.2f} 1" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )


def chart(title: str, numbers: Mapping[int, int], unit: str, form: str, *, step: float) -> str:
    """A histogram. Values far from all others share one bar at their end, so that the rest stays visible."""
    if not numbers:
        return f"<figure><figcaption>{title}</figcaption><p class='quiet'>none</p></figure>"
    low, high = _in_sight(numbers)
    width = -(-(high - low + 1) // _BARS)
    bars = [(form.format((low + n * width) * step), 0) for n in range((high - low) // width + 1)]
    below = above = 0
    for value, number in numbers.items():
        if value < low:
            below += number
        elif value > high:
            above += number
        else:
            name, counted_here = bars[(value - low) // width]
            bars[(value - low) // width] = (name, counted_here + number)
    ends = [form.format(value * step) for value in sorted({low, high})]
    if below:
        bars.insert(0, (f"less than {form.format(low * step)}", below))
        ends[0] = f"from {form.format(min(numbers) * step)}"
    if above:
        bars.append((f"more than {form.format(high * step)}", above))
        ends[-1] = f"up to {form.format(max(numbers) * step)}"
    return _histogram(title, bars, unit, ends)


def _in_sight(numbers: Mapping[int, int]) -> tuple[int, int]:
    """The values between which bars are drawn: all, or those inside Tukey's outer fences if a few lie far outside."""
    values = sorted(numbers)
    if values[-1] - values[0] < _BARS:
        return values[0], values[-1]
    sums = list(accumulate(numbers[value] for value in values))
    lower, upper = (next(v for v, n in zip(values, sums, strict=True) if n >= q * sums[-1]) for q in (0.25, 0.75))
    reach = 3 * max(1, upper - lower)
    inside = [value for value in values if lower - reach <= value <= upper + reach]
    if 2 * (inside[-1] - inside[0]) > values[-1] - values[0]:
        return values[0], values[-1]
    return inside[0], inside[-1]


def _histogram(title: str, bars: list[tuple[str, int]], unit: str, ends: list[str]) -> str:
    most = max(number for _, number in bars)
    drawn = [
        f'<rect x="{i + 0.08:g}" y="{100 - height:.1f}" width="0.84" height="{height:.1f}">'
        f"<title>{name}: {counted(number, unit)}</title></rect>"
        for i, (name, number) in enumerate(bars)
        if (height := max(2.0, 100 * number / most) if number else 0)
    ]
    few = f" few-{len(bars)}" if len(bars) < _FEW_BARS else ""
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {max(len(bars), _FEW_BARS)} 100" role="img" '
        f'preserveAspectRatio="none" aria-label="{title}: histogram">{"".join(drawn)}</svg>'
        f'<div class="ends{few}" aria-hidden="true">{"".join(f"<span>{end}</span>" for end in ends)}</div></figure>'
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
