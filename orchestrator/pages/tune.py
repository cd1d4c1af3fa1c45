"""One HTML file with the verdict on a tuned decoder: figures before and after, and the answers that changed most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np

from db.results import StoredMask
from orchestrator.pages.page import fact, fill_page, safe_text, tile
from orchestrator.pages.photo import ReadPhoto, embedded_photo, photos_of
from orchestrator.shapes.outlines import GRID, outline
from orchestrator.tuning.verdict import NAMES, Judged, Measured, Verdict, said_of_defaults
from workers.masks import BoolMask, decode_counts, mask_from_pixels
from workers.tuning.outcome import Shown
from workers.tuning.plan import Plan

_PICTURE_BYTES = 40_000
_AROUND = 0.6  # of the three masks' common box, on each side
_LEAST_SIDE_PX = 48

Window = tuple[int, int, int, int]  # y0, y1, x0, x1 in pixels of the image


def write_tune(plan: Plan, judged: Judged, verdict: Verdict, out: Path) -> None:
    """Write the page. Photos are read from the source again. Where one is gone, only outlines are shown."""
    parts = {
        "name": [safe_text(plan.name)],
        "facts": _facts(plan),
        "said": _said(judged, verdict),
        "tiles": _tiles(judged),
        "tables": _tables(verdict),
        "pictures": _pictures(plan, judged.shown),
        "footer": _footer(plan),
    }
    fill_page("tune", parts, out)


def _facts(plan: Plan) -> Iterator[str]:
    facts = {
        "Tuned from": plan.model,
        "Source": plan.source,
        "Label Studio": f"{plan.server}/projects/{plan.project}",
    }
    return (fact(name, value) for name, value in facts.items())


def _said(judged: Judged, verdict: Verdict) -> Iterator[str]:
    if verdict.is_better:
        yield '<p class="good">Better: boxes or clicks gain, and nothing is lost.</p>'
    for reason in verdict.reasons:
        yield f'<p class="bad">{safe_text(reason)}</p>'
    yield f"<p>{safe_text(said_of_defaults(judged))}</p>"


def _tiles(judged: Judged) -> Iterator[str]:
    taught = judged.rest["taught"]
    yield tile("images that taught", f"{taught['assets']:,}")
    yield tile("their objects", f"{taught['objects']:,}")
    yield tile("deleted masks", f"{taught['deleted']:,}")
    yield tile("images that judged", f"{len(judged.assets):,}")
    yield tile("steps", f"{judged.rest['steps']:,}")
    yield tile("images encoded here", f"{judged.rest['encoded']:,}")


def _tables(verdict: Verdict) -> Iterator[str]:
    yield from _table("On the held-out images", verdict.measured)
    if len(verdict.by_label) > 1:
        for label, measured in verdict.by_label.items():
            yield from _table(label, measured)


def _table(title: str, measured: dict[str, Measured]) -> Iterator[str]:
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("figure", "before", "after", "gain", "95 % of resamples", "objects")
    )
    yield f'<section><h2><bdi>{safe_text(title)}</bdi></h2><div class="sheet counts"><table><thead><tr>{heads}</tr>'
    yield "</thead><tbody>\n"
    for name, found in measured.items():
        css_class = "good" if found.gains else "bad" if found.loses else ""
        yield (
            f"<tr><td>{NAMES[name]}</td><td>{found.before:.3f}</td><td>{found.after:.3f}</td>"
            f'<td class="{css_class}">{found.gain:+.3f}</td><td>{found.interval}</td>'
            f"<td>{found.objects:,}</td></tr>\n"
        )
    yield "</tbody></table></div></section>\n"


def _pictures(plan: Plan, shown: Sequence[Shown]) -> Iterator[str]:
    read = photos_of(plan.source)
    for title, some in (
        ("Largest gains", [one for one in shown if one.gain > 0]),
        ("Largest losses", [one for one in shown if one.gain < 0]),
    ):
        if some:
            yield f'<section><h2>{title}</h2><div class="changes">\n'
            yield from (_picture(read, one) for one in some)
            yield "</div></section>\n"


def _picture(read: ReadPhoto, shown: Shown) -> str:
    masks = {name: decode_counts(getattr(shown, name), shown.size_hw) for name in ("person", "before", "after")}
    window = _window(masks["person"] | masks["before"] | masks["after"])
    y0, y1, x0, x1 = window
    photo = embedded_photo(
        read, shown.key, _PICTURE_BYTES, size_hw=shown.size_hw, window=(slice(y0, y1), slice(x0, x1))
    )
    sides = "".join(
        f'<div class="shot" style="--shape:{_shape(window):.3f}">{photo}'
        f"{_outlines(masks['person'], masks[name], window)}"
        f'<span class="side">{name} {iou:.2f}</span></div>'
        for name, iou in zip(("before", "after"), shown.ious, strict=True)
    )
    said = f"{safe_text(shown.label)} · by a {shown.prompt} · IoU <b>{shown.gain:+.3f}</b>"
    return (
        f'<figure class="sheet pair"><div class="two">{sides}</div>'
        f'<figcaption><bdi class="key">{safe_text(shown.key)}</bdi> · {said}</figcaption></figure>\n'
    )


def _window(masks: BoolMask) -> Window:
    """Around all pixels of these masks, inside the image."""
    x, y, width, height = cv2.boundingRect(masks.view(np.uint8))
    wide, high = max(_LEAST_SIDE_PX, width * (1 + _AROUND)), max(_LEAST_SIDE_PX, height * (1 + _AROUND))
    wide, high = max(wide, high / 2), max(high, wide / 2)
    middle_x, middle_y = x + width / 2, y + height / 2
    rows, columns = masks.shape
    return (
        max(0, int(middle_y - high / 2)),
        min(rows, int(middle_y + high / 2) + 1),
        max(0, int(middle_x - wide / 2)),
        min(columns, int(middle_x + wide / 2) + 1),
    )


def _shape(window: Window) -> float:
    y0, y1, x0, x1 = window
    return (x1 - x0) / (y1 - y0)


def _outlines(person: BoolMask, answer: BoolMask, window: Window) -> str:
    """The person's mask and the model's answer as SVG over the window."""
    y0, y1, x0, x1 = window
    unit = GRID / max(y1 - y0, x1 - x0)
    paths = "".join(
        f'<path class="{name}" d="{_path(mask[y0:y1, x0:x1])}"/>'
        for name, mask in (("answer", answer), ("person", person))
    )
    box = f"0 0 {(x1 - x0) * unit:.1f} {(y1 - y0) * unit:.1f}"
    return f'<svg class="masks" viewBox="{box}" aria-hidden="true">{paths}</svg>'


def _path(pixels: BoolMask) -> str:
    mask = mask_from_pixels(np.ascontiguousarray(pixels), predicted_iou=0.0)
    x, y, width, height = (int(side) for side in mask.bbox_xywh)
    stored = StoredMask(
        asset_id=0,
        n=0,
        counts=mask.counts,
        bbox_xywh=(x, y, width, height),
        area_px=mask.area_px,
        predicted_iou=0.0,
        stability_score=None,
        label=None,
        prompt=None,
    )
    return outline(stored, mask.size_hw)


def _footer(plan: Plan) -> Iterator[str]:
    yield f"<span>maskfleet {version('maskfleet')}, job {plan.job}, seed {plan.seed}</span>"
    yield f"<span>written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</span>"
    yield "<span>White: what people left. Colour: the model's answer.</span>"
