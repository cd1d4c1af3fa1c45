"""The verdict on a tuned decoder: how it does on the held-out assets, before and after, and whether it is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tuning.outcome import Judgement, Pair, Shown
from workers.tuning.plan import TuneError

SHARE = 0.95  # of the resamples that an interval holds
_RESAMPLES = 2000
NAMES = {
    "box": "box, mean IoU",
    "click": "click, mean IoU",
    "corrected": "click and correction, mean IoU",
    "recall": "automatic masks, recall at IoU 0.75",
    "f1": "automatic masks, F1 at IoU 0.75",
    "masks_an_object": "automatic masks an object",
}
_JUDGED = ("box", "click", "corrected", "recall", "f1")  # a loss of one of these refuses the decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One figure before and after. low, high: the interval of the gain, by a bootstrap over assets.

    One asset has no interval: all its resamples are the same. Then low and high say nothing, and are the gain.
    """

    before: float
    after: float
    gain: float
    low: float
    high: float
    objects: int
    assets: int

    @property
    def gains(self) -> bool:
        return self.low > 0 and self.assets > 1

    @property
    def loses(self) -> bool:
        return self.high < 0 and self.assets > 1

    @property
    def interval(self) -> str:
        return f"{self.low:+.3f} to {self.high:+.3f}" if self.assets > 1 else "one image"


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


def said_of_defaults(judged: Judged) -> str:
    """Which thresholds automatic masks of the new model have by default."""
    chosen = judged.rest["defaults"]
    if not chosen:
        return "Automatic masks: the thresholds stay as they were; no others did better on images that taught."
    said = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
    return f"Automatic masks: {said}, chosen on {judged.rest['thresholds']['images']} images that taught."


def decide(judgements: Sequence[Judgement]) -> Verdict:
    """The decoder is better when boxes or clicks gain, and nothing loses, each beyond its interval."""
    measured = measure(judgements)
    labels = sorted({label for one in judgements for label in one.labels})
    by_label = {label: measure(judgements, label) for label in labels}
    reasons = [
        f"{NAMES[name]} fell from {found.before:.3f} to {found.after:.3f} (by {-found.high:.3f} to {-found.low:.3f})"
        for name, found in measured.items()
        if name in _JUDGED and found.loses
    ]
    gains = [measured[name] for name in ("box", "click") if name in measured]
    if not any(found.gains for found in gains):
        said = " and ".join(f"{found.gain:+.3f} ({found.interval})" for found in gains)
        reasons.insert(0, f"neither boxes nor clicks gain beyond chance: {said or 'no object was judged'}")
    return Verdict(measured=measured, by_label=by_label, reasons=reasons)


def measure(judgements: Sequence[Judgement], label: str | None = None) -> dict[str, Measured]:
    """Each figure of the objects with this label, or of all. Figures of which nothing is known are left out."""
    rows: dict[str, list[_Row]] = {name: [] for name in NAMES}
    for one in judgements:
        for name, row in (_of_prompts(one, label) | _of_automatic(one, label)).items():
            rows[name].append(row)
    return {name: _measured(found) for name, found in rows.items() if found}


# Of one asset: sums before and after, what each is divided by, and the number of objects.
_Row = tuple[float, float, float, float, int]


def _of_prompts(one: Judgement, label: str | None) -> dict[str, _Row]:
    asked = [n for n, its in enumerate(one.labels) if label in (None, its)]
    pairs = {"box": one.box, "click": one.click, "corrected": one.corrected}
    return {name: _mean_of([found[n] for n in asked]) for name, found in pairs.items() if asked}


def _of_automatic(one: Judgement, label: str | None) -> dict[str, _Row]:
    found = [pair for pair, its in zip(one.found or (), one.found_labels or (), strict=True) if label in (None, its)]
    if not found:
        return {}
    recall = _mean_of(found)
    if label is not None:  # automatic masks have none, so which are too many for a label is not known
        return {"recall": recall}
    before, after, _, _, objects = recall
    return {
        "recall": recall,
        "f1": (2 * before, 2 * after, one.masks[0] + objects, one.masks[1] + objects, objects),
        "masks_an_object": (*one.masks, objects, objects, objects),
    }


def _mean_of(pairs: Sequence[Pair]) -> _Row:
    count = len(pairs)
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs), count, count, count


def _measured(rows: Sequence[_Row]) -> Measured:
    """Objects of one image fail together. So whole assets are drawn, not objects."""
    table = np.array(rows, np.float64)
    drawn = np.random.default_rng(0).integers(len(rows), size=(_RESAMPLES, len(rows)))
    gains = [after - before for before, after in map(_ratios, table[drawn].sum(axis=1))]
    low, high = np.quantile(gains, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    before, after = _ratios(table.sum(axis=0))
    return Measured(
        before=before,
        after=after,
        gain=after - before,
        low=float(low),
        high=float(high),
        objects=sum(row[4] for row in rows),
        assets=len(rows),
    )


def _ratios(sums: NDArray[np.float64]) -> Pair:
    """Before and after. sums: (5), as in a row."""
    return float(sums[0] / sums[2]), float(sums[1] / sums[3])


def measured_as_json(measured: dict[str, Measured]) -> dict[str, dict[str, float]]:
    return {
        name: {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(found).items()}
        for name, found in measured.items()
    }
