"""What a tuning found out about each held-out asset, as judged.json has it. Never loads torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from workers.masks import Mask
from workers.tuning.plan import PlannedAsset, TuneError

JUDGED_NAME = "judged.json"
FEWEST_ASSETS = 10
PICTURES = 12  # of gains, and of losses


class FewAssets(TuneError):
    """Too few annotated assets to learn from and to judge by."""


def require_enough(usable: int, annotated: int, left_out: Sequence[Mapping[str, str]] = ()) -> None:
    """Raise FewAssets below FEWEST_ASSETS usable assets."""
    if usable >= FEWEST_ASSETS:
        return
    of = "" if usable == annotated else f" of {annotated}"
    why = f" ({left_out[0]['key']}: {left_out[0]['error']})" if left_out else ""
    raise FewAssets(
        f"{usable}{of} annotated assets can be used{why}; a tuning needs at least {FEWEST_ASSETS}: review more, then "
        "run `maskfleet review` to read them"
    )


class Answers(Protocol):
    """What `judging.Judged` has: a model's answers for some objects of one asset."""

    @property
    def box(self) -> Sequence[float]: ...
    @property
    def click(self) -> Sequence[float]: ...
    @property
    def corrected(self) -> Sequence[float]: ...
    @property
    def shown(self) -> Mapping[str, Sequence[Mask]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Automatic masks against people's. found: how many of the objects a mask finds."""

    found: int = 0
    masks: int = 0
    objects: int = 0

    def __add__(self, other: Counted) -> Counted:
        return Counted(
            found=self.found + other.found, masks=self.masks + other.masks, objects=self.objects + other.objects
        )

    @property
    def f1(self) -> float:
        """0..1, 1 when each object has one mask and no mask is too much. 0 where there is neither."""
        return 2 * self.found / max(self.masks + self.objects, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """The automatic masks of one asset. found: of each of its objects, whether a mask finds it. masks: how many."""

    found: Sequence[bool]
    masks: int


Pair = tuple[float, float]  # before, after


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One held-out asset, before and after. labels, box, click, corrected: one entry an object that was asked for.

    found, found_labels: one entry for every object of the asset. None where no automatic masks were made. masks: how
    many automatic masks.
    """

    key: str
    labels: list[str]
    box: list[Pair]
    click: list[Pair]
    corrected: list[Pair]
    found: list[Pair] | None = None
    found_labels: list[str] | None = None
    masks: Pair = (0.0, 0.0)

    @classmethod
    def of(cls, asset: PlannedAsset, numbers: Sequence[int], before: Answers, after: Answers) -> Judgement:
        return cls(
            key=asset.key,
            labels=[asset.masks[n].label for n in numbers],
            box=list(zip(before.box, after.box, strict=True)),
            click=list(zip(before.click, after.click, strict=True)),
            corrected=list(zip(before.corrected, after.corrected, strict=True)),
        )

    def with_automatic(self, labels: list[str], before: Searched, after: Searched) -> Judgement:
        """The same with automatic masks. labels: of all objects."""
        found = [(float(a), float(b)) for a, b in zip(before.found, after.found, strict=True)]
        masks = (float(before.masks), float(after.masks))
        return replace(self, found=found, found_labels=labels, masks=masks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """An object whose answer changed much. prompt: box or click. counts: COCO run lengths of three masks."""

    key: str
    size_hw: tuple[int, int]
    label: str
    prompt: str
    ious: Pair
    person: str
    before: str
    after: str

    @property
    def gain(self) -> float:
        return self.ious[1] - self.ious[0]

    @classmethod
    def of(cls, asset: PlannedAsset, numbers: Sequence[int], before: Answers, after: Answers) -> list[Shown]:
        """Each object with the prompt whose answer changed most."""
        made = []
        for row, n in enumerate(numbers):
            pairs = {"box": (before.box[row], after.box[row]), "click": (before.click[row], after.click[row])}
            prompt = max(pairs, key=lambda name: abs(pairs[name][1] - pairs[name][0]))
            made.append(
                cls(
                    key=asset.key,
                    size_hw=asset.size_hw,
                    label=asset.masks[n].label,
                    prompt=prompt,
                    ious=pairs[prompt],
                    person=asset.masks[n].counts,
                    before=before.shown[prompt][row].counts,
                    after=after.shown[prompt][row].counts,
                )
            )
        return made

    @staticmethod
    def most_changed(shown: Sequence[Shown]) -> list[Shown]:
        """The largest gains first, then the largest losses."""
        gains = sorted((one for one in shown if one.gain > 0), key=lambda one: -one.gain)[:PICTURES]
        losses = sorted((one for one in shown if one.gain < 0), key=lambda one: one.gain)[:PICTURES]
        return gains + losses
