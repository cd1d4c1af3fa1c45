"""One job's page, region by region: how far it is, when it did what, what failed, who works at it, what it found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby

from db import clicks, jobs, progress, published, results, review_counts, samples
from db.clicks import ClickTally
from db.jobs import Counts, Job
from db.progress import AtWork
from db.published import Published
from db.publishing import LsProject
from db.results import FailedAsset, LabeledAsset
from db.review_counts import AssetCounts
from db.session import Connection
from orchestrator.board.charts import over_time
from orchestrator.board.home import chip, job_bar
from orchestrator.jobs.activity import Activity, read_activity
from orchestrator.label_studio.review_numbers import Numbers, sum_of
from orchestrator.pages.gallery import PICTURED, WHAT_HAPPENED
from orchestrator.pages.page import chart, counted, safe_text, share_bar, tile
from orchestrator.pages.photo import mask_outlines
from orchestrator.terminal.progress import duration, speed

_SAMPLES = 12
_OUTLINES_CHARS = 12_000
_EXAMPLES = 4  # a kind of failure


def standing(db: Connection, job: Job) -> str:
    """How far the job is, how fast, and what keeps it from going on."""
    counts = jobs.count_job(db, job_id=job.id)
    activity = read_activity(db, job, counts)
    error = job.error or "; ".join(activity.obstacles)
    notice = f'<div class="notice" role="note"><p>{safe_text(error)}</p></div>' if error else ""
    return (
        f'<p class="standing">{chip(job.state)}{"".join(f"<span>{said}</span>" for said in _pace(job, activity))}</p>'
        f'{notice}{job_bar(counts)}<dl class="tiles">{"".join(_tiles(counts))}</dl>'
    )


def _pace(job: Job, activity: Activity) -> Iterator[str]:
    if activity.assets_per_second:
        yield f"<b>{speed(activity.assets_per_second)}</b>"
    if activity.seconds_left:
        yield f"about <b>{duration(round(activity.seconds_left))}</b> left"
    if job.finished_at is not None:
        yield f"finished in <b>{duration((job.finished_at - job.created_at).total_seconds())}</b>"


def _tiles(counts: Counts) -> Iterator[str]:
    yield tile("listed", f"{counts.listed:,}")
    yield tile("labeled", f"{counts.labeled:,}")
    yield tile("failed", f"{counts.failed:,}", "bad" if counts.failed else "")
    if counts.pending:
        yield tile("pending", f"{counts.pending:,}")
    yield tile("masks", f"{counts.masks:,}")
    if counts.reused:
        yield tile("answered from stored", f"{counts.reused:,}")
    if counts.without_prompts:
        yield tile("without prompts", f"{counts.without_prompts:,}")


def time_chart(db: Connection, job: Job) -> str:
    counts = jobs.count_job(db, job_id=job.id)
    stored = progress.stored_over_time(db, job_id=job.id)
    until = datetime.now(UTC) if job.finished_at is None else job.finished_at
    return over_time(stored, counts, max(until, stored[-1].at) if stored else until)


def histograms(db: Connection, job: Job) -> str:
    return chart("Masks per image", results.masks_per_asset(db, job_id=job.id), "image", "{:,}", step=1) + chart(
        "Predicted IoU", results.predicted_iou_percents(db, job_id=job.id), "mask", "{:.2f}", step=0.01
    )


def failures(db: Connection, job: Job) -> str:
    """The kinds of failures with their newest examples."""
    counts = jobs.count_job(db, job_id=job.id)
    if not counts.failed:
        return '<p class="quiet">Nothing failed.</p>'
    examples = samples.failed_of_each_kind(db, job_id=job.id, each=_EXAMPLES)
    kinds = {kind: list(group) for kind, group in groupby(examples, lambda asset: asset.error_kind)}
    most_first = sorted(kinds, key=lambda kind: -counts.failed_by_kind.get(kind, 0))
    return "".join(_kind(job, kind, counts.failed_by_kind.get(kind, 0), kinds[kind]) for kind in most_first)


def _kind(job: Job, kind: str, number: int, examples: Sequence[FailedAsset]) -> str:
    rows = "".join(_example(job, asset) for asset in examples)
    return (
        f'<div class="sheet kind"><h3>{safe_text(kind)} · {number:,}<span>{WHAT_HAPPENED.get(kind, "")}</span></h3>'
        f'<ul class="examples">{rows}</ul></div>'
    )


def _example(job: Job, asset: FailedAsset) -> str:
    key = safe_text(asset.key)
    photo = ""
    if asset.error_kind in PICTURED:
        photo = f'<img loading="lazy" src="/jobs/{job.id}/photos/{asset.asset_id}" alt="{key}">'
    reason = safe_text(asset.error.removeprefix(f"{asset.key}: "))
    return f'<li>{photo}<div><bdi class="key">{key}</bdi><p>{reason}</p></div></li>'


def workers(db: Connection, job: Job) -> str:
    """Who holds chunks of the job."""
    found = progress.at_work(db, job_id=job.id)
    if not found:
        return '<p class="quiet">Nobody is at work on this job now.</p>'
    return f'<ul class="rows">{"".join(map(_worker, found))}</ul>'


def _worker(worker: AtWork) -> str:
    about = [*([worker.device] if worker.device else []), *([worker.model] if worker.model else [])]
    held = "" if worker.held_seconds is None else f", for {duration(max(round(worker.held_seconds), 0))}"
    late = ' <span class="bad">its lease has expired</span>' if worker.lease_seconds < 0 else ""
    return (
        f'<li><b><bdi>{safe_text(worker.worker)}</bdi></b><span class="quiet">{safe_text(" · ".join(about))}</span>'
        f"<span>{counted(worker.in_flight, 'image')} in hand{held}{late}</span></li>"
    )


def pictures(db: Connection, job: Job) -> str:
    """A few labeled images of the whole job with their masks."""
    ids = samples.sample_ids(db, job_id=job.id, limit=_SAMPLES)
    if not ids:
        return '<p class="quiet">No labeled image yet.</p>'
    by_label = len(results.labels_of(db, job_id=job.id)) > 1
    assets = samples.labeled_of_ids(db, job_id=job.id, asset_ids=ids)
    return f'<ul class="samples">{"".join(_picture(job, asset, by_label=by_label) for asset in assets)}</ul>'


def _picture(job: Job, asset: LabeledAsset, *, by_label: bool) -> str:
    height, width = asset.size_hw
    key, count = safe_text(asset.key), counted(len(asset.masks), "mask")
    outlines, _ = mask_outlines(asset, by_label=by_label, room=_OUTLINES_CHARS)
    return (
        f'<li class="card"><button class="shot" aria-label="Enlarge {key}, {count}">'
        f'<img loading="lazy" width="{width}" height="{height}" src="/jobs/{job.id}/photos/{asset.asset_id}" '
        f'alt="{key}">{outlines}</button><div class="text"><bdi class="key">{key}</bdi>'
        f'<span class="meta"><b>{count}</b> · {width}&nbsp;×&nbsp;{height}</span></div></li>'
    )


def people(db: Connection, job: Job) -> str:
    """What people have of the job, and what they did with it."""
    found = published.published(db, job_id=job.id)
    if not found:
        return '<p class="quiet">Not published. <code>maskfleet publish</code> brings it into Label Studio.</p>'
    return "".join(_project(db, job, project) for project in found)


def _project(db: Connection, job: Job, project: Published) -> str:
    ls_project = LsProject(project.server, project.project_id)
    assets = review_counts.asset_counts(db, job_id=job.id, ls_project=ls_project)
    masks = sum_of(review_counts.tallies(db, job_id=job.id, ls_project=ls_project), job.model_version)
    tallies = clicks.click_tallies(db, job_id=job.id, ls_project=ls_project)
    done = assets.untouched + assets.corrected + assets.elsewhere + assets.skipped
    return (
        f'<div class="sheet project"><h3>Label Studio project {project.project_id}</h3>'
        f'<p class="quiet"><bdi>{safe_text(project.server)}</bdi></p>'
        f'<dl class="tiles">{"".join(_published(project, assets, done))}</dl>'
        f"{share_bar({'': assets.untouched, 'edited': assets.corrected}, max(assets.published, 1))}"
        f'<dl class="tiles">{"".join(_verdicts(masks, tallies))}</dl></div>'
    )


def _published(project: Published, assets: AssetCounts, done: int) -> Iterator[str]:
    yield tile("published", f"{project.assets:,}")
    if project.refused:
        yield tile("refused", f"{project.refused:,}", "bad")
    yield tile("reviewed", f"{done:,}")
    yield tile("unchanged", f"{assets.untouched:,}")
    yield tile("corrected", f"{assets.corrected:,}")
    yield tile("waiting", f"{assets.waiting:,}")


def _verdicts(masks: Numbers, tallies: Sequence[ClickTally]) -> Iterator[str]:
    if masks.predicted:
        yield tile("masks kept", f"{100 * masks.kept / masks.predicted:.0f}<small> %</small>")
        yield tile("edited", f"{masks.edited:,}")
        yield tile("deleted", f"{masks.deleted:,}")
        yield tile("added", f"{masks.added:,}")
    if tallies:
        yield tile("clicks", f"{sum(tally.clicks for tally in tallies):,}")
        yield tile("objects by clicks", f"{sum(tally.objects for tally in tallies):,}")
