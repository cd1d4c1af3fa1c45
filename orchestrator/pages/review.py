"""One HTML file that shows how people corrected a job: numbers, plots, and the assets that were corrected most.

It uses the gallery's style, contains everything it needs and runs no script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from db import results, reviewed_masks
from db.results import LabeledAsset
from db.review_counts import Reviewed
from db.session import Connection, Engine
from orchestrator.label_studio.review_numbers import BANDS, Numbers, Review
from orchestrator.pages.page import counted, duration, fact, fill_page, safe_text, share_bar, tile
from orchestrator.pages.photo import ReadPhoto, embedded_photo, mask_outlines, photos_of

_PHOTO_BYTES = 250_000  # the page has each photo twice, for ten assets
_COLUMNS = ("predicted", "kept", "edited", "relabelled", "deleted", "added", "mean IoU of edited")


def write_review(engine: Engine, review: Review, out: Path) -> None:
    """Write the page. Photos are read from the job's source again. Where one is gone, only its outlines are shown."""
    with engine.connect() as db:
        parts = {
            "name": [safe_text(review.job.name or f"job {review.job.id}")],
            "facts": _facts(review),
            "tiles": _tiles(review),
            "share": [_share(review.masks)],
            "charts": _charts(review),
            "tables": _tables(review),
            "worst": _worst(db, review),
            "footer": _footer(review),
        }
        fill_page("review", parts, out)


def _facts(review: Review) -> Iterator[str]:
    facts = {
        "Source": review.job.source,
        "Model": review.job.model_version,
        "Label Studio": f"{review.ls_project.server}/projects/{review.ls_project.project_id}",
    }
    return (fact(name, value) for name, value in facts.items())


def _tiles(review: Review) -> Iterator[str]:
    assets, masks = review.assets, review.masks
    yield tile("assets published", f"{assets.published:,}")
    yield tile("accepted unchanged", f"{assets.untouched:,}")
    yield tile("corrected", f"{assets.corrected:,}")
    for name, number in (("skipped", assets.skipped), ("not started from this version", assets.elsewhere)):
        if number:
            yield tile(name, f"{number:,}")
    yield tile("waiting", f"{assets.waiting:,}")
    if masks.predicted:
        yield tile("masks kept", f"{100 * masks.kept / masks.predicted:.1f}<small> %</small>")
    if masks.mean_iou is not None:
        yield tile("IoU of edited", f"{masks.mean_iou:.3f}")
    if review.seconds_mean is not None:
        yield tile("a task, on average", duration(review.seconds_mean))
    if review.accepted is not None:
        yield tile(f"score above which {review.accepted.share:.0%} were kept", f"{review.accepted.score:.3f}")


def _share(masks: Numbers) -> str:
    return share_bar({"": masks.kept, "edited": masks.edited, "deleted": masks.deleted}, masks.predicted)


def _charts(review: Review) -> Iterator[str]:
    yield _stacks(review.by_band)
    yield _curve(review)


def _stacks(bands: Mapping[int, Numbers]) -> str:
    """Predictions by score, stacked: kept at the bottom, then edited, then deleted."""
    title = "Predictions by score: kept, edited, deleted"
    if not bands:
        return f"<figure><figcaption>{title}</figcaption><p class='quiet'>none</p></figure>"
    low, most = min(bands), max(numbers.predicted for numbers in bands.values())
    bars = []
    for band, numbers in sorted(bands.items()):
        top = 100.0
        for name in ("kept", "edited", "deleted"):
            height = 100 * getattr(numbers, name) / most
            top -= height
            said = f"{band / BANDS:.2f} to {(band + 1) / BANDS:.2f}: {getattr(numbers, name):,} {name}"
            x = band - low + 0.08
            bars.append(
                f'<rect class="{name}" x="{x:.2f}" y="{top:.2f}" width="0.84" height="{height:.2f}">'
                f"<title>{said}</title></rect>"
            )
    ends = f"<span>{low / BANDS:.2f}</span><span>1.00</span>"
    return (
        f'<figure><figcaption>{title}</figcaption><svg class="stack" viewBox="0 0 {BANDS - low} 100" role="img" '
        f'preserveAspectRatio="none" aria-label="{title}">{"".join(bars)}</svg>'
        f'<div class="ends" aria-hidden="true">{ends}</div></figure>'
    )


def _curve(review: Review) -> str:
    """For each score: the share of kept masks among the predictions with at least that score."""
    title = "Share kept of all with this score or more"
    kept = predictions = 0
    points = []
    for score, kept_here, here in review.by_score:
        kept += kept_here
        predictions += here
        points.append((100 * score, 100 - 100 * kept / predictions))
    if not points:
        return f"<figure><figcaption>{title}</figcaption><p class='quiet'>none</p></figure>"
    low = min(x for x, _ in points) - 1
    # Scores have four decimals, so there are at most ten thousand. A screen shows some hundreds.
    shown = points[:: max(1, len(points) // 500)]
    line = "L".join(f"{x:.2f} {y:.2f}" for x, y in sorted({*shown, points[-1]}))
    return (
        f'<figure><figcaption>{title}</figcaption><svg class="curve" viewBox="{low:.2f} 0 {101 - low:.2f} 100" '
        f'role="img" preserveAspectRatio="none" aria-label="{title}"><line x1="{low:.2f}" x2="101" y1="5" y2="5"/>'
        f'<path d="M{line}"/></svg><div class="ends" aria-hidden="true"><span>{low / 100:.2f}</span><span>1.00</span>'
        f"</div></figure>"
    )


def _tables(review: Review) -> Iterator[str]:
    versions = {name or "no prediction of ours": numbers for name, numbers in review.by_version.items()}
    bands = {
        f"{band / BANDS:.2f} to {(band + 1) / BANDS:.2f}": review.by_band[band]
        for band in sorted(review.by_band, reverse=True)
    }
    yield from _table("By label", "label", review.by_label)
    yield from _table("By score", "score", bands)
    yield from _table("By the model version from which the annotation started", "version", versions)


def _table(title: str, first: str, rows: Mapping[str, Numbers]) -> Iterator[str]:
    if not rows:
        return
    heads = "".join(f'<th scope="col">{name}</th>' for name in (first, *_COLUMNS))
    yield f'<section><h2>{title}</h2><div class="sheet counts"><table><thead><tr>{heads}</tr></thead><tbody>\n'
    for name, numbers in rows.items():
        iou = "–" if numbers.mean_iou is None else f"{numbers.mean_iou:.3f}"
        cells = [f"{getattr(numbers, column):,}" for column in _COLUMNS[:-1]]
        row = "".join(f"<td>{cell}</td>" for cell in (*cells, iou))
        yield f"<tr><td><bdi>{safe_text(name)}</bdi></td>{row}</tr>\n"
    yield "</tbody></table></div></section>\n"


def _worst(db: Connection, review: Review) -> Iterator[str]:
    if not review.worst:
        return
    yield "<section><h2>Corrected most</h2><p>Left: the prediction. Right: the correction.</p>\n"
    read = photos_of(review.job.source)
    for asset in review.worst:
        yield _pair(db, review, read, asset)
    yield "</section>\n"


def _pair(db: Connection, review: Review, read: ReadPhoto, asset: Reviewed) -> str:
    ids = [asset.asset_id]
    with db.begin():
        before = results.masks_of(db, asset_ids=ids).get(asset.asset_id, [])
        after = reviewed_masks.chosen_masks(db, job_id=review.job.id, asset_ids=ids).get(asset.asset_id, [])
    photo = embedded_photo(read, asset.key, _PHOTO_BYTES)
    key = safe_text(asset.key)
    sides = []
    for name, masks in (("prediction", before), ("correction", list(after))):
        shown = LabeledAsset(asset_id=asset.asset_id, key=asset.key, size_hw=asset.size_hw, masks=list(masks))
        outlines, _ = mask_outlines(shown, by_label=len(review.by_label) > 1)
        shape = max(0.5, min(3.0, asset.size_hw[1] / asset.size_hw[0]))
        sides.append(
            f'<div class="shot" style="--shape:{shape:.3f}">{photo}{outlines}'
            f'<span class="side">{name}, {counted(len(masks), "mask")}</span></div>'
        )
    counts = ", ".join(f"{getattr(asset, name):,} {name}" for name in ("kept", "edited", "deleted", "added"))
    return (
        f'<figure class="sheet pair"><div class="two">{"".join(sides)}</div><figcaption><bdi class="key">{key}</bdi> · '
        f"agreement <b>{asset.agreement:.3f}</b> · {counts} · task {asset.task_id}</figcaption></figure>\n"
    )


def _footer(review: Review) -> Iterator[str]:
    yield f"<span>maskfleet {version('maskfleet')}, job {review.job.id}</span>"
    yield f"<span>written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</span>"
    yield "<span>Agreement: a kept mask counts 1, an edited one its IoU, a deleted or added one 0.</span>"
