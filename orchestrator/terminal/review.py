"""A review's numbers as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from db.clicks import ClickTally
from orchestrator.label_studio.review_numbers import Numbers, Review
from orchestrator.terminal.console import printable


def print_review(console: Console, review: Review) -> None:
    """How people changed a job's masks: assets, time, masks by label, score and version."""
    assets, masks = review.assets, review.masks
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    judged = assets.untouched + assets.corrected
    rows = {
        "assets": f"{assets.published:,} published = {assets.untouched:,} accepted untouched + "
        f"{assets.corrected:,} corrected + {assets.elsewhere:,} not begun from this version + "
        f"{assets.skipped:,} skipped + {assets.waiting:,} waiting",
        "untouched": f"{assets.untouched / judged:.1%} of the judged assets" if judged else "",
        "several annotators": f"{assets.several_annotators:,} assets" if assets.several_annotators else "",
        "unreadable": f"{assets.unreadable_regions:,} regions that are no masks, or damaged"
        if assets.unreadable_regions
        else "",
        "time a task": f"{review.seconds_mean:.1f} s on average, {review.seconds_median:.1f} s median"
        if review.seconds_mean is not None and review.seconds_median is not None
        else "",
        "score": f"at least {review.accepted.share:.0%} of the {review.accepted.predictions:,} predictions with "
        f"{review.accepted.score:.4f} or more were kept untouched"
        if review.accepted
        else "",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    console.print(table)
    versions = {name or "no prediction of ours": numbers for name, numbers in review.by_version.items()}
    bands = {f"{b / 20:.2f} to {(b + 1) / 20:.2f}": review.by_band[b] for b in sorted(review.by_band, reverse=True)}
    console.print(_numbers_table("masks", {"all": masks}))
    for first, found in (("label", review.by_label), ("score", bands), ("model version", versions)):
        if found:
            console.print(_numbers_table(first, found))
    if review.clicks:
        console.print(_clicks_table(review.clicks))


def _clicks_table(tallies: Sequence[ClickTally]) -> Table:
    """Clicks by label. An object is asked for by one click or more; accepted: its mask is in the annotation."""
    table = Table(box=None, pad_edge=False)
    table.add_column("clicks by label")
    for name in ("objects", "clicks an object", "accepted", "by the decoder", "by stored masks", "median ms"):
        table.add_column(name, justify="right")
    for tally in tallies:
        table.add_row(
            Text(printable(tally.label)),
            f"{tally.objects:,}",
            f"{tally.clicks / tally.objects:.1f}",
            f"{tally.accepted / tally.objects:.0%}",
            f"{tally.by_decoder:,}",
            f"{tally.by_stored:,}",
            f"{tally.milliseconds_median:.0f}",
        )
    return table


def _numbers_table(first: str, rows: Mapping[str, Numbers]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in ("predicted", "kept", "edited", "relabelled", "deleted", "added", "IoU of edited"):
        table.add_column(name, justify="right")
    for name, n in rows.items():
        counts = (n.predicted, n.kept, n.edited, n.relabelled, n.deleted, n.added)
        iou = "-" if n.mean_iou is None else f"{n.mean_iou:.3f}"
        table.add_row(Text(printable(name)), *(f"{count:,}" for count in counts), iou)
    return table
