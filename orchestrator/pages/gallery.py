"""One HTML file that shows what a job found: what failed and why, then photos with their masks, and numbers.

It contains everything it needs and loads nothing (its own policy forbids it). It stays under 5 MB for a job of any
size. Masks are SVG outlines: sharp on every screen, and smaller than images of the masks. All text from a source is
untrusted and goes through `safe_text`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from db import jobs, results, samples
from db.jobs import Counts, Job
from db.results import FailedAsset, LabeledAsset
from db.session import Connection
from orchestrator.label_studio.names import DEFAULT_LABEL
from orchestrator.pages.choice import Choice, choose
from orchestrator.pages.page import chart, counted, duration, fact, fill_page, safe_text, share_bar, tile
from orchestrator.pages.photo import MASKS_CHARS, ReadPhoto, embedded_photo, mask_outlines, photos_of
from orchestrator.shapes.colours import label_colour
from workers.errors import ErrorKind

FAILED_A_KIND = 40

_CARDS_BYTES = 4_300_000  # of the page's 5 MB; the rest is for failed assets and the frame
_CARD_BYTES = 440_000
_CARD_TEXT_BYTES = 1_500
_OUTLINES_SHARE = 0.45  # of a card's bytes at most; its photo has the rest
_FAILED_PHOTOS, _FAILED_PHOTO_BYTES = 6, 12_000  # a kind
_THREADS = 4  # decoding and outlines release the interpreter's lock; fetching waits for the store
_PIXELS_AT_ONCE = 50_000_000  # decoding takes 7 bytes for each pixel

# What failed after its photo was decoded. Of the others the photo cannot be read, or reading it may harm.
PICTURED = frozenset({ErrorKind.BAD_PROMPT, ErrorKind.GPU_OOM, ErrorKind.INTERNAL})
WHAT_HAPPENED: dict[str, str] = {
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
    """The content of the page. seconds: the job's time, None while it is not over. read: returns the photo of a key.

    assets: with pictures, `cards` of them at most. said: what they are. failed: FAILED_A_KIND of each kind at most.
    """

    job: Job
    counts: Counts
    seconds: float | None
    notice: str | None
    assets: Iterable[LabeledAsset]
    cards: int
    said: str
    failed: Sequence[FailedAsset]
    labels: Sequence[str]
    masks_per_asset: Mapping[int, int]
    iou_percents: Mapping[int, int]
    read: ReadPhoto


def write_gallery(
    db: Connection,
    job: Job,
    out: Path,
    *,
    seconds: float | None = None,
    notice: str | None = None,
    choice: Choice | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write the page of a job, and return how many labeled assets it shows.

    seconds: the time for the job; default: until it was finished. notice: shown at the top, with words in backticks as
    code. choice: which assets; default: evenly spread. progress: called with 1 after each of them.
    Photos are read from the job's source again. Where a photo is gone, only its outlines are shown.
    Raises ChoiceError if nothing can be chosen.
    """
    choice = choice or Choice()
    counts = jobs.count_job(db, job_id=job.id)
    chosen = choose(db, job, counts, choice)
    assets = samples.labeled_of_ids(db, job_id=job.id, asset_ids=chosen.asset_ids)
    if seconds is None and job.finished_at is not None:
        seconds = (job.finished_at - job.created_at).total_seconds()
    gallery = Gallery(
        job=job,
        counts=counts,
        seconds=seconds,
        notice=notice,
        assets=_told(_of_label(assets, choice.label), progress),
        cards=len(chosen.asset_ids),
        said=chosen.said,
        failed=samples.failed_of_each_kind(db, job_id=job.id, each=FAILED_A_KIND),
        labels=results.labels_of(db, job_id=job.id),
        masks_per_asset=results.masks_per_asset(db, job_id=job.id),
        iou_percents=results.predicted_iou_percents(db, job_id=job.id),
        read=photos_of(job.source),
    )
    write_page(gallery, out)
    return gallery.cards


def _of_label(assets: Iterable[LabeledAsset], label: str | None) -> Iterator[LabeledAsset]:
    for asset in assets:
        wanted = [m for m in asset.masks if label is None or (DEFAULT_LABEL if m.label is None else m.label) == label]
        yield replace(asset, masks=wanted)


def _told(assets: Iterable[LabeledAsset], progress: Callable[[int], None]) -> Iterator[LabeledAsset]:
    for asset in assets:
        yield asset
        progress(1)


def write_page(gallery: Gallery, out: Path) -> None:
    """Fill the template, one card at a time."""
    counts = gallery.counts
    parts: dict[str, Iterable[str]] = {
        "name": [safe_text(gallery.job.name or f"job {gallery.job.id}")],
        "facts": _facts(gallery.job),
        "notice": _notice(gallery.notice),
        "tiles": _tiles(gallery),
        "share": [share_bar({"": counts.labeled, "bad": counts.failed}, counts.listed)],
        "charts": _charts(gallery),
        "shown": [safe_text(gallery.said)],
        "legend": _legend(gallery.labels),
        "cards": _cards(gallery),
        "failed": _failed(gallery),
        "skipped": _skipped(gallery.job.skipped),
        "footer": _footer(gallery.job),
    }
    fill_page("gallery", parts, out)


def _cards(gallery: Gallery) -> Iterator[str]:
    if gallery.cards == 0:
        yield '<li class="empty">No labeled asset to show.</li>'
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="gallery") as pool:
        for batch in _batches(gallery.assets):
            yield from pool.map(lambda asset: _card(asset, gallery), batch)


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


def _card(asset: LabeledAsset, gallery: Gallery) -> str:
    height, width = asset.size_hw
    shape = min(3.0, max(0.62, width / height))
    count = counted(len(asset.masks), "mask")
    time = "" if asset.segment_ms is None else f" · {asset.segment_ms / 1000:.1f}&nbsp;s"
    key = safe_text(asset.key)
    folder, slash, name = key.rpartition("/")
    room = min(_CARD_BYTES, _CARDS_BYTES // max(1, gallery.cards)) - _CARD_TEXT_BYTES
    # With one label, colours are by instance: one colour for all would hide where an instance ends.
    masks, left_out = mask_outlines(
        asset, by_label=len(gallery.labels) > 1, room=min(MASKS_CHARS, int(room * _OUTLINES_SHARE))
    )
    # base64 makes four characters of three bytes.
    photo = embedded_photo(gallery.read, asset.key, (room - len(masks)) * 3 // 4, asset.size_hw)
    note = f" · the smallest {left_out} not drawn" if left_out else ""
    return (
        f'<li class="card" style="--shape:{shape:.3f}"{_sort_keys(asset)}>'
        f'<button class="shot" aria-label="Enlarge {key}, {count}">{photo}{masks}</button>'
        f'<div class="text"><bdi class="key" title="{key}"><span class="folder">{folder}{slash}</span>'
        f"<span>{name}</span></bdi>"
        f'<span class="meta"><b>{count}</b> · {width}&nbsp;×&nbsp;{height}{time}{note}</span></div></li>\n'
    )


def _sort_keys(asset: LabeledAsset) -> str:
    sort = f' data-masks="{len(asset.masks)}"'
    if asset.segment_ms is not None:
        sort += f' data-ms="{asset.segment_ms}"'
    if asset.masks:
        sort += f' data-iou="{sum(mask.predicted_iou for mask in asset.masks) / len(asset.masks):.4f}"'
    return sort


def _facts(job: Job) -> Iterator[str]:
    for name, value in {"Source": job.source, "Model": job.model_version, "Job": str(job.id)}.items():
        yield fact(name, value)
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
    if gallery.seconds is not None:
        yield tile("time", duration(gallery.seconds))
    if counts.reused:
        yield tile("answered from stored", f"{counts.reused:,}")
    if counts.without_prompts:
        yield tile("without prompts", f"{counts.without_prompts:,}")


def _charts(gallery: Gallery) -> Iterator[str]:
    yield chart("Masks per asset", gallery.masks_per_asset, "asset", "{:,}", step=1)
    yield chart("Predicted IoU of the masks", gallery.iou_percents, "mask", "{:.2f}", step=0.01)


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
        yield f" The newest {FAILED_A_KIND} of each kind are shown; {command} lists all."
    yield "</p>\n"
    for kind, failed in groupby(gallery.failed, lambda asset: asset.error_kind):
        yield from _failed_kind(gallery, kind, list(failed))
    yield "</section>\n"


def _failed_kind(gallery: Gallery, kind: str, failed: Sequence[FailedAsset]) -> Iterator[str]:
    number = gallery.counts.failed_by_kind.get(kind, 0)
    yield f'<div class="sheet kind"><h3>{safe_text(kind)} · {number:,}<span>{WHAT_HAPPENED.get(kind, "")}</span></h3>'
    yield '<div class="rows" tabindex="0"><table>'
    yield '<thead class="unseen"><tr><th scope="col">Asset</th><th scope="col">Found</th></tr></thead><tbody>\n'
    for n, asset in enumerate(failed):
        photo = ""
        if kind in PICTURED and n < _FAILED_PHOTOS:
            photo = f'<span class="thumb">{embedded_photo(gallery.read, asset.key, _FAILED_PHOTO_BYTES)}</span>'
        reason = safe_text(asset.error.removeprefix(f"{asset.key}: "))
        yield f'<tr><td>{photo}<bdi class="key">{safe_text(asset.key)}</bdi></td><td>{reason}</td></tr>\n'
    yield "</tbody></table></div></div>\n"


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
