"""Masks written with COPY in its binary format.

There are so many masks that the form counts: rows of bytes take half the time that lines of text take here, and the
server parses no numbers. It checks each field's length and UTF-8, parses the prompt, and refuses a row with another
number of columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import chain, islice
from struct import Struct

from sqlalchemy import Connection

from db.copied_outcomes import MASK_COLUMNS
from db.copying import copy_in
from db.mask_prompt import pack_prompt
from db.results import StoredMask

_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + bytes(8)  # no flags, no extension of the header
_END = b"\xff\xff"
# Each field is its length in bytes and its value, in network order. A null has the length -1 and no value.
_LENGTH = Struct(">i").pack
_NULL = _LENGTH(-1)
_COLUMNS = 12
_ROWS_A_PART = 25  # about what a connection sends at once
_FIRST = Struct(">h iq ii i").pack  # the number of columns, asset_id, n, and the length of counts
_NUMBERS = Struct(">ii ii ii ii ii if").pack  # bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou
_REAL = Struct(">if").pack
_JSONB_VERSION = b"\x01"


def copy_masks(db: Connection, *, masks: Iterable[StoredMask]) -> None:
    """COPY masks. Call it in the transaction that writes their outcomes."""
    rows = map(_row, masks)
    parts = iter(lambda: b"".join(islice(rows, _ROWS_A_PART)), b"")
    if first := next(parts, None):
        statement = f"COPY mask ({MASK_COLUMNS}) FROM STDIN (FORMAT binary)"
        copy_in(db, statement, chain((_SIGNATURE, first), parts, (_END,)))


def _row(mask: StoredMask) -> bytes:
    x, y, width, height = mask.bbox_xywh
    counts = mask.counts.encode()
    stability = mask.stability_score
    return b"".join(
        (
            _FIRST(_COLUMNS, 8, mask.asset_id, 4, mask.n, len(counts)),
            counts,
            _NUMBERS(4, x, 4, y, 4, width, 4, height, 4, mask.area_px, 4, mask.predicted_iou),
            _NULL if stability is None else _REAL(4, stability),
            _label(mask.label),
            _NULL if mask.prompt is None else _field(_JSONB_VERSION + pack_prompt(mask.prompt)),
        )
    )


@lru_cache(maxsize=1000)
def _label(label: str | None) -> bytes:
    return _NULL if label is None else _field(label.encode())


def _field(value: bytes) -> bytes:
    return _LENGTH(len(value)) + value
