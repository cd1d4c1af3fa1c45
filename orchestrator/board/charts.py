"""How a job went, drawn as SVG: assets by outcome over time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from db.jobs import Counts
from db.progress import StoredThen

_MOST_POINTS = 240


def over_time(stored: Sequence[StoredThen], counts: Counts, until: datetime) -> str:
    """Labeled and failed assets, summed from the first outcome to `until`, on the height of what is listed.

    stored: of a sample of the job. Its sums are stretched to the exact counts.
    """
    if not stored or counts.listed == 0:
        return '<p class="quiet">Nothing is stored yet.</p>'
    first, seconds = stored[0].at, max((until - stored[0].at).total_seconds(), 1.0)
    points = _sums(stored, counts)
    failed = [((at - first).total_seconds() / seconds * 100, n_failed) for at, _, n_failed in points]
    both = [((at - first).total_seconds() / seconds * 100, labeled + n_failed) for at, labeled, n_failed in points]
    drawn = _area("labeled", both, counts.listed) + _area("bad", failed, counts.listed)
    named = f"{counts.labeled:,} labeled and {counts.failed:,} failed of {counts.listed:,} listed"
    return (
        f'<svg class="pace" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="Assets over time: '
        f'{named}"><line x1="0" x2="100" y1="25" y2="25"/><line x1="0" x2="100" y1="50" y2="50"/>'
        f'<line x1="0" x2="100" y1="75" y2="75"/>{drawn}</svg><div class="ends" aria-hidden="true">'
        f"<span>{_clock(first, until)}</span><span>{_clock(until, first)}</span></div>"
    )


def _sums(stored: Sequence[StoredThen], counts: Counts) -> list[tuple[datetime, float, float]]:
    """Growing sums, as if every asset had been looked at: (time, labeled, failed)."""
    all_labeled = sum(then.labeled for then in stored)
    all_failed = sum(then.failed for then in stored)
    labeled = failed = 0
    points: list[tuple[datetime, float, float]] = []
    for n, then in enumerate(stored):
        labeled, failed = labeled + then.labeled, failed + then.failed
        if n % max(1, len(stored) // _MOST_POINTS) == 0 or n == len(stored) - 1:
            points.append(
                (
                    then.at,
                    counts.labeled * labeled / all_labeled if all_labeled else 0.0,
                    counts.failed * failed / all_failed if all_failed else 0.0,
                )
            )
    return points


def _area(css_class: str, points: Sequence[tuple[float, float]], most: int) -> str:
    """points: (0..100 from the left, number). Between two of them the line is straight."""
    if not any(number for _, number in points):
        return ""
    line = "L".join(f"{x:.2f} {100 - 100 * number / most:.2f}" for x, number in points)
    last = f"100 {100 - 100 * points[-1][1] / most:.2f}"
    return f'<path class="{css_class}" d="M0 100L{line}L{last}L100 100z"/>'


def _clock(moment: datetime, other: datetime) -> str:
    form = "%H:%M:%S" if moment.date() == other.date() else "%Y-%m-%d %H:%M"
    return f"{moment.astimezone(UTC):{form}} UTC"
