"""The partitions of `mask`: each holds the masks of a range of asset ids. They are made while a source is listed.

Asset ids are never given again. So a large job fills whole partitions, and deleting it empties them at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import attrgetter

from sqlalchemy import Connection, text

PARTITION_ASSETS = 2**20  # smaller ones are more: a join with masks plans for each, and locks each
_AHEAD = 2  # partitions that are made before they are needed
_PREFIX = "mask_part_"
_LOCK = 7_271_902_312  # of pg_advisory_xact_lock: any number that nothing else uses


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """It has the masks of the assets with first <= id < bound."""

    table: str
    first: int
    bound: int


def is_partition(table: str) -> bool:
    return table.startswith(_PREFIX)


def make_partitions(db: Connection, *, last_asset_id: int) -> None:
    """Make the partitions up to this asset id and a little further, unless they are there.

    Nobody who reads or writes masks waits for it.
    """
    bound = _bound(db)
    if last_asset_id + PARTITION_ASSETS < bound:
        return
    db.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    bound = _bound(db)
    while bound < last_asset_id + _AHEAD * PARTITION_ASSETS:
        _make_partition(db, bound, bound + PARTITION_ASSETS)
        bound += PARTITION_ASSETS


def _make_partition(db: Connection, first: int, bound: int) -> None:
    # CREATE TABLE ... PARTITION OF would wait for every reader, and keep all waiting that come after it.
    db.execute(text(f"CREATE TABLE {_PREFIX}{first} (LIKE mask INCLUDING DEFAULTS INCLUDING CONSTRAINTS)"))
    db.execute(text(f"ALTER TABLE {_PREFIX}{first} ADD PRIMARY KEY (asset_id, n)"))
    db.execute(
        text(f"ALTER TABLE mask ATTACH PARTITION {_PREFIX}{first} FOR VALUES FROM ({first}) TO ({bound})"),
    )


def partitions(db: Connection) -> list[Partition]:
    """The partitions of `mask` in the order of their ranges."""
    statement = text(
        """SELECT c.relname AS table, pg_get_expr(c.relpartbound, c.oid) AS range
           FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'mask'::regclass"""
    )
    found = []
    for row in db.execute(statement):
        # FOR VALUES FROM (MINVALUE) TO ('262144'), or FROM ('262144') TO ('524288')
        *first, bound = map(int, re.findall(r"\d+", row.range))
        found.append(Partition(table=row.table, first=first[0] if first else 0, bound=bound))
    return sorted(found, key=attrgetter("bound"))


def _bound(db: Connection) -> int:
    return partitions(db)[-1].bound
