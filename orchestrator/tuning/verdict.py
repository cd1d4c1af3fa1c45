"""The verdict on a tuned decoder: how it does on the held-out assets, before and after, and whether it is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tuning.outcome import Judgement, Shown
from workers.tuning.plan import TuneError

SHARE = 0.95  # of the resamples that an interval holds
_RESAMPLES = 2000
NAMES = {
    "box": "box, mean IoU",
    "click": "click, mean IoU",
    "corrected": "click and correction, mean IoU",
    "recall": "automatic masks, recall at IoU 0.75",
    "masks_an_object": "automatic masks an object",
}
_JUDGED = ("box", "click", "corrected", "recall")  # a loss of one of these refuses the decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One figure before and after. low, high: the interval of the gain, by a bootstrap over assets."""

    before: float
    after: float
    gain: float
    low: float
    high: float
    objects: int
    assets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """measured: by figure, of all objects. by_label: the same for each label. reasons: why it is not kept."""

    measured: dict[str, Measured]
    by_label: dict[str, dict[str, Measured]]
    reasons: list[str]

    @property
    def is_better(self) -> bool:
        return not self.reasons


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """judged.json: what the process of a tuning left. The rest of the document is passed on as it is."""

    assets: list[Judgement]
    shown: list[Shown]
    rest: dict[str, Any]


def read_judged(path: Path) -> Judged:
    try:
        document = json.loads(path.read_bytes())
        assets = [Judgement(**one) for one in document.pop("assets")]
        shown = [Shown(**{**one, "size_hw": tuple(one["size_hw"])}) for one in document.pop("shown")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TuneError(f"{path}: cannot be read ({error}); run the same command again") from error
    return Judged(assets=assets, shown=shown, rest=document)


def decide(judgements: Sequence[Judgement]) -> Verdict:
    """The decoder is better when boxes or clicks gain, and nothing loses, each beyond its interval."""
    measured = measure(judgements)
    labels = sorted({label for one in judgements for label in one.labels})
    by_label = {label: measure(judgements, label) for label in labels}
    reasons = [
        f"{NAMES[name]} fell from {found.before:.3f} to {found.after:.3f} (by {-found.high:.3f} to {-found.low:.3f})"
        for name, found in measured.items()
        if name in _JUDGED and found.high < 0
    ]
    gains = [measured[name] for name in ("box", "click") if name in measured]
    if not any(found.low > 0 for found in gains):
        said = " and ".join(f"{found.gain:+.3f} ({found.low:+.3f} to {found.high:+.3f})" for found in gains)
        reasons.insert(0, f"neither boxes nor clicks gain beyond chance: {said or 'no object was judged'}")
    return Verdict(measured=measured, by_label=by_label, reasons=reasons)


def measure(judgements: Sequence[Judgement], label: str | None = None) -> dict[str, Measured]:
    """Each figure of the objects with this label, or of all. Figures of which nothing is known are left out."""
    sums: dict[str, list[tuple[float, float, int]]] = {name: [] for name in NAMES}
    for one in judgements:
        rows = [row for row, found in enumerate(one.labels) if label in (None, found)]
        if not rows:
            continue
        for name, pairs in (("box", one.box), ("click", one.click), ("corrected", one.corrected)):
            sums[name].append(_sum([pairs[row] for row in rows]))
        if one.found is not None:
            sums["recall"].append(_sum([one.found[row] for row in rows]))
            if label is None:
                sums["masks_an_object"].append((*one.masks, len(rows)))
    return {name: _measured(np.array(rows, np.float64)) for name, rows in sums.items() if rows}


def _sum(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, int]:
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs), len(pairs)


def _measured(rows: NDArray[np.float64]) -> Measured:
    """rows: (assets, 3), the sums before and after and the number of objects of each asset.

    Objects of one image fail together. So whole assets are drawn, not objects.
    """
    before, after, objects = rows.sum(axis=0)
    drawn = np.random.default_rng(0).integers(len(rows), size=(_RESAMPLES, len(rows)))
    resampled = rows[drawn].sum(axis=1)
    gains = (resampled[:, 1] - resampled[:, 0]) / resampled[:, 2]
    low, high = np.quantile(gains, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Measured(
        before=float(before / objects),
        after=float(after / objects),
        gain=float((after - before) / objects),
        low=float(low),
        high=float(high),
        objects=int(objects),
        assets=len(rows),
    )


def measured_as_json(measured: dict[str, Measured]) -> dict[str, dict[str, float]]:
    return {
        name: {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(found).items()}
        for name, found in measured.items()
    }
