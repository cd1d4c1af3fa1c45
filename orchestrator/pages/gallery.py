"""One HTML file that shows what a job found: photos with their masks, numbers, and what failed and why.

It contains everything it needs and loads nothing (its own policy forbids it). It stays under about 40 MB for a job of
any size. Masks are SVG outlines: sharp on every screen, and smaller than images of the masks. All text from a source is
untrusted and goes through `safe_text`.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from db import jobs, results
from db.jobs import Counts, Job
from db.results import FailedAsset, LabeledAsset
from db.session import Connection
from db.settings import settings
from orchestrator.pages.page import TEMPLATE, chart, counted, duration, fill_template, safe_text, tile
from orchestrator.pages.photo import mask_outlines, small_jpeg
from orchestrator.shapes.colours import label_colour
from workers.errors import AssetError, ErrorKind, SourceError, TransientError
from workers.images.decode import decode
from workers.images.pixels import RgbImage
from workers.storage.source import open_source

MAX_CARDS = 200
MAX_FAILED = 500

_ALL_PHOTOS_BYTES = 22_000_000  # base64 adds a third
_PHOTO_BYTES = 300_000
_THREADS = 4  # decoding and outlines release the interpreter's lock; fetching waits for the store
_PIXELS_AT_ONCE = 50_000_000  # decoding takes 7 bytes for each pixel

log = logging.getLogger(__name__)

_WHAT_HAPPENED: dict[str, str] = {
    ErrorKind.NOT_FOUND: "listed, but gone when it was read",
    ErrorKind.FORBIDDEN: "the store or the file's permissions do not allow reading it",
    ErrorKind.TOO_LARGE: "more bytes or pixels than this deployment accepts",
    ErrorKind.NOT_IMAGE: "not an image",
    ErrorKind.TRUNCATED: "an image that is cut off or damaged",
    ErrorKind.UNSUPPORTED: "an image format that maskfleet does not decode",
    ErrorKind.DECODE_TIMEOUT: "an image that takes minutes to decode",
    ErrorKind.GPU_OOM: "does not fit in device memory, even alone",
    ErrorKind.CRASHED_WORKER: "crashed its worker process three times while it ran alone",
    ErrorKind.BAD_PROMPT: "its prompt does not fit the image",
    ErrorKind.INTERNAL: "an error in maskfleet: please report it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """The content of the page. read: returns the photo of a key. failed: the first MAX_FAILED failed assets."""

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

    seconds: the caller's time for the job. notice: shown at the top, with words in backticks as code.
    Photos are read from the job's source again. Where a photo is gone, only its outlines are shown.
    """
    source = open_source(job.source, s3_endpoint=settings().s3_endpoint)

    def read(key: str) -> RgbImage:
        content = source.read(key, settings().max_object_bytes)
        return decode(content, name=key, max_pixels=settings().max_pixels)

    gallery = Gallery(
        job=job,
        counts=jobs.count_job(db, job_id=job.id),
        seconds=seconds,
        notice=notice,
        assets=results.sample_labeled(db, job_id=job.id, limit=MAX_CARDS),
        failed=results.failed_assets(db, job_id=job.id, limit=MAX_FAILED),
        labels=results.labels_of(db, job_id=job.id),
        masks_per_asset=results.masks_per_asset(db, job_id=job.id),
        iou_percents=results.predicted_iou_percents(db, job_id=job.id),
        read=read,
    )
    write_page(gallery, out)


def write_page(gallery: Gallery, out: Path) -> None:
    """Fill the template, one card at a time."""
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


def _cards(gallery: Gallery) -> Iterator[str]:
    photo_bytes = min(_PHOTO_BYTES, _ALL_PHOTOS_BYTES // max(1, min(gallery.counts.labeled, MAX_CARDS)))
    if gallery.counts.labeled == 0:
        yield '<li class="empty">No asset of this job is labeled yet.</li>'
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="gallery") as pool:
        for batch in _batches(gallery.assets):
            yield from pool.map(lambda asset: _card(asset, gallery, photo_bytes), batch)


def _batches(assets: Iterable[LabeledAsset]) -> Iterator[list[LabeledAsset]]:
    """A few assets at a time; fewer when their photos are large."""
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
    # With one label, colours are by instance: one colour for all would hide where an instance ends.
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
            return '<span class="gone">The image has changed since then.</span>'
        jpeg = small_jpeg(image, photo_bytes)
    except (AssetError, TransientError, SourceError) as error:
        log.warning("the gallery has no photo of asset %d: %s", asset.asset_id, error)
        kind = error.kind if isinstance(error, AssetError) else "the store does not answer"
        return f'<span class="gone">The image cannot be read any more: {safe_text(str(kind))}.</span>'
    data = base64.b64encode(jpeg).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{safe_text(asset.key)}">'


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


def _share(counts: Counts) -> Iterator[str]:
    shares = {"": counts.labeled, "bad": counts.failed, "pending": counts.pending}
    return (f'<i class="{name}" style="flex:{number}"></i>' for name, number in shares.items() if number)


def _charts(gallery: Gallery) -> Iterator[str]:
    yield chart("Masks per asset", gallery.masks_per_asset, "asset", "{:,}", step=1)
    yield chart("Predicted IoU of the masks", gallery.iou_percents, "mask", "{:.2f}", step=0.01)


def _shown(labeled: int) -> str:
    if labeled > MAX_CARDS:
        return f"{MAX_CARDS:,} of {labeled:,} assets shown, evenly spread"
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
        yield f" The first {len(gallery.failed):,} are shown; {command} lists all."
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
        yield "<section><h2>Skipped</h2><p>Found when the source was listed, but not used as assets.</p>"
        yield '<ul class="skipped">'
        for reason, number in sorted(skipped.items()):
            yield f"<li><b>{number:,}</b> {safe_text(reason.replace('_', ' '))}</li>"
        yield "</ul></section>\n"


def _footer(job: Job) -> Iterator[str]:
    yield f"<span>maskfleet {version('maskfleet')}, job {job.id}</span>"
    yield f"<span>written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</span>"
    yield "<span>Masks are drawn as outlines; <code>maskfleet export</code> gives their exact pixels.</span>"
