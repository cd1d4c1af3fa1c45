"""What comes from Label Studio: labeling configs, annotations, brush streams; and run lengths."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from db.annotations import KnownTask
from orchestrator.label_studio.brush import BrushError, decode_brush, encode_brush_counts
from orchestrator.label_studio.config import ConfigError, find_controls, label_config, merge_config
from orchestrator.label_studio.prompt_controls import add_prompt_controls, prompt_controls
from orchestrator.label_studio.review import judge_task
from orchestrator.shapes.runs import edges_of_masks
from tests.fuzz.target import Target, files
from workers.masks import encode_counts

SIZE_HW = (60, 80)
VERSION = "stub@55555555+00000000"


def _mask() -> np.ndarray:
    pixels = np.zeros(SIZE_HW, bool)
    pixels[10:40, 5:35] = True
    pixels[20:25, 10:15] = False
    return pixels


def _read_config(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    controls = find_controls(text)
    merge_config(text, kinds=["polygon", "brush"], labels=["car", "new"])
    prompt_controls(text)
    add_prompt_controls(text, ["car"], image_name=controls.image_name)


def _regions() -> list[dict[str, Any]]:
    frame = {"original_width": 80, "original_height": 60, "image_rotation": 0, "to_name": "image"}
    points = [[10, 10], [50.5, 10], [50, 60]]
    brush = encode_brush_counts(encode_counts(_mask()), SIZE_HW)
    box = {"x": 10, "y": 10, "width": 30, "height": 20, "rotation": 7}
    ellipse = {"x": 40, "y": 40, "radiusX": 10, "radiusY": 5, "rotation": 0}
    return [
        {"id": "m5-0", "type": "polygonlabels", "value": {"points": points, "polygonlabels": ["car"]}, **frame},
        {"id": "m5-0-p1", "type": "polygonlabels", "value": {"points": points, "closed": True}, **frame},
        {"id": "m5-1", "type": "brushlabels", "value": {"format": "rle", "rle": brush, "brushlabels": ["x"]}, **frame},
        {"id": "m5-2", "type": "rectanglelabels", "value": {**box, "rectanglelabels": ["car"]}, **frame},
        {"id": "abc", "type": "ellipselabels", "value": {**ellipse, "ellipselabels": ["car", "bus"]}, **frame},
        {"id": "t", "type": "choices", "value": {"choices": ["x"]}},
    ]


def _judge(data: bytes) -> None:
    """Judge an annotation whose regions are these. Text that is no JSON list never gets this far."""
    try:
        result = json.loads(data)
    except (ValueError, RecursionError):
        return
    prediction = {"id": 7, "model_version": VERSION, "result": _regions()}
    annotation = {"id": 3, "updated_at": "2026-01-01T00:00:00Z", "parent_prediction": 7, "was_cancelled": False}
    annotation |= {"result": result if isinstance(result, list) else [result], "completed_by": 1, "lead_time": 1.5}
    known = KnownTask(ls_task_id=1, task_id=1, asset_ids={VERSION: 5}, sizes_hw={5: SIZE_HW})
    judge_task({"annotations": [annotation], "predictions": [prediction]}, known)


TARGETS = [
    Target(
        name="labeling configs",
        read=_read_config,
        allowed=(ConfigError, ValueError),
        seeds=lambda: [
            label_config(["car", 'a "b" <c> & д']).encode(),
            b'<View><Image name="i" value="$image"/><Choices name="c" toName="i"><Choice value="x"/></Choices></View>',
        ],
    ),
    Target(
        name="annotations",
        read=_judge,
        allowed=(),
        seeds=lambda: [
            json.dumps(_regions()).encode(),
            *(json.dumps([region]).encode() for region in _regions()),
            *files("ls_vectors", "lsf_*.json"),
        ],
    ),
    Target(
        name="brush streams",
        read=lambda data: decode_brush(list(data), SIZE_HW),
        allowed=(BrushError,),
        seeds=lambda: [bytes(encode_brush_counts(encode_counts(mask), SIZE_HW)) for mask in (_mask(), ~_mask())],
    ),
    Target(
        name="run lengths",
        read=lambda data: edges_of_masks([data.decode("latin-1")], SIZE_HW),
        allowed=(ValueError,),
        seeds=lambda: [encode_counts(mask).encode() for mask in (_mask(), ~_mask(), np.ones(SIZE_HW, bool))],
    ),
]
