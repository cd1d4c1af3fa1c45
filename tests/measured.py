"""What the benchmarks of the database share: figures with their bars, how they are told, and a made-up outcome."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from db.leases import NewOutcome
from db.results import StoredMask

COUNTS = "".join(random.Random(1).choices("0123456789abcdefghijklmnopqrstuvwxyz", k=192))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A figure. bar: the limit, None where there is none."""

    name: str
    value: float
    bar: float | None = None
    holds: bool | None = None


def report(bars: Sequence[Bar], *, as_json: bool) -> None:
    """Print the figures, and end the process: with 1 where a bar does not hold."""
    if as_json:
        print(json.dumps({"bars": [asdict(bar) for bar in bars]}, indent=2))
    else:
        for bar in bars:
            judged = "" if bar.bar is None else f"bar {bar.bar:g} {'holds' if bar.holds else 'MISSED'}"
            print(f"{bar.name:60} {bar.value:12.3f}  {judged}")
    sys.exit(1 if any(bar.holds is False for bar in bars) else 0)


def outcome_with(asset_id: int, *, masks: int) -> NewOutcome:
    """A labeled asset with so many masks of 192 bytes of run lengths."""
    found = [
        StoredMask(
            asset_id=asset_id,
            n=n,
            counts=COUNTS,
            bbox_xywh=(10, 10, 100, 100),
            area_px=5000,
            predicted_iou=0.9123,
            stability_score=0.9512,
            label="car",
            prompt={"points": [[512.5, 341.5, 1]]},
        )
        for n in range(masks)
    ]
    return NewOutcome(asset_id=asset_id, width=1024, height=768, segment_ms=50, masks=found)
