"""One HTML file that shows what a job found: photos under their masks, numbers, and what failed and why.

It holds everything it needs, asks nobody for anything (its own policy forbids it), and stays under about 40 MB whatever
the job's size. Masks are outlines in SVG: crisp on every screen, and smaller than pictures of them. Everything that
comes from a source is text from strangers and goes through `safe_text`.
"""

from __future__ import annotations

import base64
import colorsys
import hashlib
import html
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
from sqlalchemy import Connection

from db import jobs as queries
from db.jobs import Counts, FailedAsset, Job, LabeledAsset, StoredMask
from db.settings import settings
from orchestrator.export.coco import replacing
from orchestrator.shapes.colours import label_colour
from orchestrator.shapes.outlines import GRID, outline
from workers.errors import AssetError, ErrorKind, SourceError, TransientError
from workers.images.decode import RgbImage, decode, thumbnail_jpeg
from workers.storage.source import open_source

TEMPLATE = Path(__file__).with_name("gallery.html")
MAX_CARDS = 200
MAX_FAILED = 500

_PHOTO_SIDE_PX = 1280
_PHOTO_QUALITY = 82
_ALL_PHOTOS_BYTES = 22_000_000  # a third more as base64
_PHOTO_BYTES = 300_000
_MASKS_CHARS = 40_000  # of all outlines of an asset; those of 100 masks of a busy scene
_THREADS = 4  # decoding and outlines run outside the interpreter's lock; fetching waits
_PIXELS_AT_ONCE = 50_000_000  # decoding takes 7 bytes each
_BARS = 24

log = logging.getLogger(__name__)

_WHAT_HAPPENED: dict[str, str] = {
    ErrorKind.NOT_FOUND: "listed, but gone when it was read",
    ErrorKind.FORBIDDEN: "the store, or the file's permissions, refuse to hand it out",
    ErrorKind.TOO_LARGE: "more bytes or pixels than this deployment accepts",
    ErrorKind.NOT_IMAGE: "bytes that are no picture",
    ErrorKind.TRUNCATED: "a picture whose bytes end too early or are damaged",
    ErrorKind.UNSUPPORTED: "a kind of picture that is not decoded",
    ErrorKind.DECODE_TIMEOUT: "a picture that takes minutes to decode",
    ErrorKind.GPU_OOM: "does not fit into the device's memory, even alone",
    ErrorKind.CRASHED_WORKER: "ended its worker process three times while alone",
    ErrorKind.BAD_PROMPT: "its prompt does not fit it",
    ErrorKind.INTERNAL: "a mistake of ours: please report it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """What the page tells. read: the photo of a key; failed: the first MAX_FAILED; the rest of the names say it."""

    job: Job
    counts: Counts
    seconds: float
    notice: str | None
    assets: Iterable[LabeledAsset]
    failed: Sequence[FailedAsset]
    labels: Sequence[str]
    masks_per_asset: Mapping[int, int]
    iou_percents: Mapping[int, int]
    read: Callable[[str], RgbImage]


def write_gallery(db: Connection, job: Job, out: Path, *, seconds: float, notice: str | None = None) -> None:
    """Write the page of a job: at most MAX_CARDS labeled assets, evenly chosen, and MAX_FAILED failed ones.

    seconds: how long the caller took. notice: shown above all else, `such` words as code; for demonstration models.
    Photos are read from the job's source again; one that is gone since is shown as its outlines alone.
    """
    source = open_source(job.source, s3_endpoint=settings().s3_endpoint)

    def read(key: str) -> RgbImage:
        content = source.read(key, settings().max_object_bytes)
        return decode(content, name=key, max_pixels=settings().max_pixels)

    gallery = Gallery(
        job=job,
        counts=queries.count_job(db, job_id=job.id),
        seconds=seconds,
        notice=notice,
        assets=queries.sample_labeled(db, job_id=job.id, limit=MAX_CARDS),
        failed=queries.failed_assets(db, job_id=job.id, limit=MAX_FAILED),
        labels=queries.labels_of(db, job_id=job.id),
        masks_per_asset=queries.masks_per_asset(db, job_id=job.id),
        iou_percents=queries.predicted_iou_percents(db, job_id=job.id),
        read=read,
    )
    write_page(gallery, out)


def write_page(gallery: Gallery, out: Path) -> None:
    """Fill the template, a card at a time."""
    parts: dict[str, Iterable[str]] = {
        "name": [safe_text(gallery.job.name)],
        "facts": _facts(gallery.job),
        "notice": _notice(gallery.notice),
        "tiles": _tiles(gallery),
        "share": _share(gallery.counts),
        "charts": _charts(gallery),
        "shown": [_shown(gallery.counts.labeled)],
        "legend": _legend(gallery.labels),
        "cards": _cards(gallery),
        "failed": _failed(gallery),
        "skipped": _skipped(gallery.job.skipped),
        "footer": _footer(gallery.job),
    }
    fill_template(TEMPLATE.read_text(encoding="utf-8"), parts, out)


def fill_template(template: str, parts: Mapping[str, Iterable[str]], out: Path) -> None:
    """Write the template to `out` with each {{name}} filled; {{script_hash}} is found here, from the script in it."""
    script = template.partition("<script>")[2].partition("</script>")[0]
    script_hash = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    with replacing(out) as file:
        # What fills one gap is never looked at for another, whatever it says.
        for n, piece in enumerate(re.split(r"\{\{(\w+)\}\}", template)):
            file.writelines([piece] if n % 2 == 0 else [script_hash] if piece == "script_hash" else parts[piece])


def instance_colour(n: int) -> str:
    """The nth colour, #rrggbb: hues a golden ratio of the circle apart, so that any few neighbours differ."""
    rgb = colorsys.hls_to_rgb((0.47 + n * 0.618033988749895) % 1, (0.55, 0.62, 0.48)[n % 3], 0.85)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


# -------------------------------------------------------------------------------------------------------------- cards


def _cards(gallery: Gallery) -> Iterator[str]:
    photo_bytes = min(_PHOTO_BYTES, _ALL_PHOTOS_BYTES // max(1, min(gallery.counts.labeled, MAX_CARDS)))
    if gallery.counts.labeled == 0:
        yield '<li class="empty">No asset of this job is labeled yet.</li>'
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="gallery") as pool:
        for batch in _batches(gallery.assets):
            yield from pool.map(lambda asset: _card(asset, gallery, photo_bytes), batch)


def _batches(assets: Iterable[LabeledAsset]) -> Iterator[list[LabeledAsset]]:
    """A few assets at a time; the larger their photos, the fewer."""
    batch: list[LabeledAsset] = []
    for asset in assets:
        pixels = sum(height * width for height, width in (a.size_hw for a in (*batch, asset)))
        if batch and (len(batch) == _THREADS or pixels > _PIXELS_AT_ONCE):
            yield batch
            batch = []
        batch.append(asset)
    if batch:
        yield batch


def _card(asset: LabeledAsset, gallery: Gallery, photo_bytes: int) -> str:
    height, width = asset.size_hw
    shape = min(3.0, max(0.62, width / height))
    count = counted(len(asset.masks), "mask")
    time = "" if asset.segment_ms is None else f" · {asset.segment_ms / 1000:.1f}&nbsp;s"
    sort = f' data-masks="{len(asset.masks)}"'
    if asset.segment_ms is not None:
        sort += f' data-ms="{asset.segment_ms}"'
    if asset.masks:
        sort += f' data-iou="{sum(mask.predicted_iou for mask in asset.masks) / len(asset.masks):.4f}"'
    key = safe_text(asset.key)
    folder, slash, name = key.rpartition("/")
    photo = _photo(asset, gallery.read, photo_bytes)
    # One colour for all would tell nothing, and hide where one instance ends.
    masks, left_out = mask_outlines(asset, by_label=len(gallery.labels) > 1)
    note = f" · the smallest {left_out} not drawn" if left_out else ""
    return (
        f'<li class="card" style="--shape:{shape:.3f}"{sort}>'
        f'<button class="shot" aria-label="Enlarge {key}, {count}">{photo}{masks}</button>'
        f'<div class="text"><bdi class="key" title="{key}"><span class="folder">{folder}{slash}</span>'
        f"<span>{name}</span></bdi>"
        f'<span class="meta"><b>{count}</b> · {width}&nbsp;×&nbsp;{height}{time}{note}</span></div></li>\n'
    )


def _photo(asset: LabeledAsset, read: Callable[[str], RgbImage], photo_bytes: int) -> str:
    try:
        image = read(asset.key)
        if image.shape[:2] != asset.size_hw:
            return '<span class="gone">The picture has changed since.</span>'
        jpeg = small_jpeg(image, photo_bytes)
    except (AssetError, TransientError, SourceError) as error:
        log.warning("the gallery has no photo of asset %d: %s", asset.asset_id, error)
        kind = error.kind if isinstance(error, AssetError) else "the store does not answer"
        return f'<span class="gone">The picture cannot be read any more: {safe_text(str(kind))}.</span>'
    data = base64.b64encode(jpeg).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{safe_text(asset.key)}">'


def small_jpeg(image: RgbImage, most_bytes: int) -> bytes:
    """Shrink until it fits; a few tries, since a JPEG's bytes go about with its pixels."""
    height, width = image.shape[:2]
    side = min(_PHOTO_SIDE_PX, max(height, width))
    if max(height, width) > side:
        # Averaging to the first size is 10 times as fast as Pillow's filter, which takes 0.1 s for 12 MP.
        scale = side / max(height, width)
        size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    jpeg = thumbnail_jpeg(image, side, _PHOTO_QUALITY)
    while len(jpeg) > most_bytes and side > 64:
        side = int(side * min(0.9, 0.95 * (most_bytes / len(jpeg)) ** 0.5))
        jpeg = thumbnail_jpeg(image, side, _PHOTO_QUALITY)
    return jpeg


def mask_outlines(asset: LabeledAsset, *, by_label: bool) -> tuple[str, int]:
    """The masks as SVG, large ones below small ones, and how many there was no room for."""
    height, width = asset.size_hw
    unit = GRID / max(height, width)
    paths: list[str] = []
    room = _MASKS_CHARS
    left_out = 0
    for mask in sorted(asset.masks, key=lambda mask: (-mask.area_px, mask.n)):
        path = _mask_path(mask, asset.size_hw, by_label=by_label) if room > 0 else ""
        room -= len(path)
        left_out += not path
        paths.append(path)
    box = f"0 0 {width * unit:.1f} {height * unit:.1f}"
    return f'<svg class="masks" viewBox="{box}" aria-hidden="true">{"".join(paths)}</svg>', left_out


def _mask_path(mask: StoredMask, size_hw: tuple[int, int], *, by_label: bool) -> str:
    try:
        d = outline(mask, size_hw)
    except ValueError as error:
        log.warning("mask %d of asset %d is not drawn: %s", mask.n, mask.asset_id, error)
        return ""
    colour = label_colour(mask.label) if by_label and mask.label is not None else instance_colour(mask.n)
    scores = f' data-area="{mask.area_px}" data-iou="{mask.predicted_iou:.2f}"'
    if mask.stability_score is not None:
        scores += f' data-stability="{mask.stability_score:.2f}"'
    if mask.label is not None:
        scores += f' data-label="{safe_text(mask.label)}"'
    return f'<path color="{colour}" data-n="{mask.n}"{scores} d="{d}"/>' if d else ""


# --------------------------------------------------------------------------------------------------------------- rest


def _facts(job: Job) -> Iterator[str]:
    facts = {"Source": job.source, "Model": job.model_version, "Job": str(job.id)}
    for name, value in facts.items():
        yield f"<div><dt>{name}</dt><dd><code>{safe_text(value)}</code></dd></div>"
    yield f"<div><dt>Submitted</dt><dd>{job.created_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC</dd></div>"


def _notice(notice: str | None) -> Iterator[str]:
    if notice:
        icon = '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2" aria-hidden="true">'
        icon += '<circle cx="12" cy="12" r="10"/><path d="M12 7v6M12 16.5v.5"/></svg>'
        marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe_text(notice))
        yield f'<div class="notice" role="note">{icon}<p>{marked}</p></div>'


def _tiles(gallery: Gallery) -> Iterator[str]:
    counts = gallery.counts
    yield tile("listed", f"{counts.listed:,}")
    yield tile("labeled", f"{counts.labeled:,}")
    yield tile("failed", f"{counts.failed:,}", "bad" if counts.failed else "")
    if counts.pending:
        yield tile(f"pending ({gallery.job.state})", f"{counts.pending:,}")
    yield tile("masks", f"{counts.masks:,}")
    yield tile("time", duration(gallery.seconds))
    if counts.reused:
        yield tile("answered from stored", f"{counts.reused:,}")
    if counts.without_prompts:
        yield tile("without prompts", f"{counts.without_prompts:,}")


def tile(name: str, number: str, css_class: str = "") -> str:
    return f'<div class="{css_class}"><dt>{safe_text(name)}</dt><dd>{number}</dd></div>'


def _share(counts: Counts) -> Iterator[str]:
    shares = {"": counts.labeled, "bad": counts.failed, "pending": counts.pending}
    return (f'<i class="{name}" style="flex:{number}"></i>' for name, number in shares.items() if number)


def _charts(gallery: Gallery) -> Iterator[str]:
    yield chart("Masks an asset", gallery.masks_per_asset, "asset", "{:,}", step=1)
    yield chart("Predicted IoU of the masks", gallery.iou_percents, "mask", "{:.2f}", step=0.01)


def chart(title: str, numbers: Mapping[int, int], unit: str, form: str, *, step: float) -> str:
    """A histogram of at most _BARS bars over the values that occur."""
    if not numbers:
        return f"<figure><figcaption>{title}</figcaption><p class='quiet'>none</p></figure>"
    low = min(numbers)
    width = -(-(max(numbers) - low + 1) // _BARS)
    bars = [0] * ((max(numbers) - low) // width + 1)
    for value, number in numbers.items():
        bars[(value - low) // width] += number
    # Few values are few bars on the left, not slabs.
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


def _shown(labeled: int) -> str:
    if labeled > MAX_CARDS:
        return f"{MAX_CARDS:,} of {labeled:,} assets shown, spread evenly over them"
    return counted(labeled, "asset")


def _legend(labels: Sequence[str]) -> Iterator[str]:
    if len(labels) > 1:
        yield '<ul class="legend">'
        for label in labels[:60]:
            dot = f'<span class="dot" style="background:{label_colour(label)}"></span>'
            yield f"<li>{dot}<bdi>{safe_text(label)}</bdi></li>"
        more = len(labels) - 60
        yield f"<li>and {more:,} more labels</li></ul>" if more > 0 else "</ul>"


def _failed(gallery: Gallery) -> Iterator[str]:
    counts = gallery.counts
    if not counts.failed:
        return
    yield f"<section><h2>Failed</h2><p>{counted(counts.failed, 'asset')} without masks, and why."
    if counts.failed > len(gallery.failed):
        command = f"<code>maskfleet show {gallery.job.id} --failed</code>"
        yield f" The first {len(gallery.failed):,} are shown; {command} has all."
    yield "</p>\n"
    for kind, failed in groupby(sorted(gallery.failed, key=lambda asset: asset.error_kind), lambda a: a.error_kind):
        meaning = _WHAT_HAPPENED.get(kind, "")
        number = counts.failed_by_kind.get(kind, 0)
        yield f'<div class="sheet kind"><h3>{safe_text(kind)} · {number:,}<span>{meaning}</span></h3><table>'
        yield '<thead class="unseen"><tr><th scope="col">Asset</th><th scope="col">Found</th></tr></thead><tbody>\n'
        for asset in failed:
            reason = safe_text(asset.error.removeprefix(f"{asset.key}: "))
            yield f'<tr><td><bdi class="key">{safe_text(asset.key)}</bdi></td><td>{reason}</td></tr>\n'
        yield "</tbody></table></div>\n"
    yield "</section>\n"


def _skipped(skipped: Mapping[str, int]) -> Iterator[str]:
    if any(skipped.values()):
        yield "<section><h2>Skipped</h2><p>Not taken as assets when the source was listed.</p>"
        yield '<ul class="skipped">'
        for reason, number in sorted(skipped.items()):
            yield f"<li><b>{number:,}</b> {safe_text(reason.replace('_', ' '))}</li>"
        yield "</ul></section>\n"


def _footer(job: Job) -> Iterator[str]:
    yield f"<span>maskfleet {version('maskfleet')}, job {job.id}</span>"
    yield f"<span>written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</span>"
    yield "<span>Masks are drawn as outlines; <code>maskfleet export</code> gives their exact pixels.</span>"


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


# Characters that turn the text around them, or break the line, without being seen.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def safe_text(text: str) -> str:
    """Escape for HTML text and quoted attributes; what cannot be seen is shown as its code."""
    return html.escape(_UNSEEN.sub(_visible, text), quote=True)


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    # The control pictures: ␊ and its like.
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"
