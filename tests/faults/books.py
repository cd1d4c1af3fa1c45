"""The books of a campaign: what was planted, and what is in the database when everything is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, text

AREA_PX = 384  # of each of the stub's two masks on a picture of 32 x 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """All but `assets` and computed_twice must be 0. left: chunks that are not done, leases that nobody holds."""

    assets: int
    lost: int
    duplicated: int
    wrong_verdicts: int
    wrong_masks: int
    left: int
    computed_twice: int

    @property
    def balanced(self) -> bool:
        return not (self.lost or self.duplicated or self.wrong_verdicts or self.wrong_masks or self.left)


def check(engine: Engine, *, planted: Mapping[str, str | None], jobs: Mapping[int, set[str]], calls: Path) -> Books:
    """planted: the error kind of each key, None for what is labeled. jobs: the keys of each job. calls: the stub's log.

    An asset has one outcome by its primary key, so `duplicated` counts assets whose masks came twice.
    """
    with engine.begin() as db:
        rows = db.execute(
            text(
                """SELECT a.job_id, a.key, o.error_kind, o.mask_count, count(m.n) AS masks,
                          count(m.n) FILTER (WHERE m.area_px <> :area OR m.n > 1) AS wrong
                   FROM asset a LEFT JOIN outcome o ON o.asset_id = a.id LEFT JOIN mask m ON m.asset_id = a.id
                   GROUP BY a.job_id, a.key, o.asset_id, o.error_kind, o.mask_count"""
            ),
            {"area": AREA_PX},
        ).all()
        left = db.execute(text("SELECT count(*) FROM chunk WHERE state <> 'done' OR in_flight <> '{}'")).scalar_one()
    listed = {(row.job_id, row.key): row for row in rows}
    wanted = {(job, key) for job, keys in jobs.items() for key in keys}
    done = {place: row for place, row in listed.items() if row.mask_count is not None or row.error_kind is not None}
    called = Counter(calls.read_text().splitlines()) if calls.exists() else Counter[str]()
    labeled = sum(row.error_kind is None for row in done.values())
    return Books(
        assets=len(wanted),
        lost=len(wanted - done.keys()),
        duplicated=len(rows) - len(listed) + sum(row.masks > 2 for row in rows),
        wrong_verdicts=sum(row.error_kind != planted[row.key] for row in done.values()),
        wrong_masks=sum(row.wrong > 0 or (row.error_kind is None and row.masks != 2) for row in done.values()),
        left=int(left),
        computed_twice=sum(called.values()) - labeled,
    )
