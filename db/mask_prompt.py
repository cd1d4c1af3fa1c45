"""A mask's prompt as the column `mask.prompt` has it.

Automatic masks have one point each, {"points": [[x, y, 1]]}, and there are billions of them. As jsonb that takes 81
bytes on average, a fifth of the row and its index. So a lone point is stored as the JSON string "x,y", which takes 34.
All other prompts are stored as they are, and so are lone points from before migration 0016.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

# In SQL: the prompt as JSON text.
PROMPT_TEXT = """CASE WHEN jsonb_typeof(prompt) = 'string'
                      THEN '{"points":[[' || (prompt #>> '{}') || ',1]]}' ELSE prompt::text END"""
_LONE_POINT = re.compile(rb'\{"points":\[\[([-+.0-9e]+,[-+.0-9e]+),1\]\]\}')


def pack_prompt(prompt: dict[str, Any]) -> bytes:
    """The JSON to store."""
    # orjson takes a tenth of json's time, but writes NaN as null. With json Postgres refuses a NaN.
    encoded = orjson.dumps(prompt)
    if lone := _LONE_POINT.fullmatch(encoded):
        return b'"' + lone[1] + b'"'
    return json.dumps(prompt, ensure_ascii=False).encode() if b"null" in encoded else encoded


def unpack_prompt(stored: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """The prompt of a column's value."""
    return {"points": [[*orjson.loads(f"[{stored}]"), 1]]} if isinstance(stored, str) else stored
