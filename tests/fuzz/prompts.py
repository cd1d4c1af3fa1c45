"""Prompt files of every format, and label maps."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from orchestrator.prompts.detectors import read_label_map
from orchestrator.prompts.files import read_prompts
from tests.fuzz.target import Target
from workers.detectors.kinds import DetectorError
from workers.errors import SourceError
from workers.models.registry import find_model

_BOX = {"label": "car", "box_xyxy": [34, 50, 210, 180]}
_POINTS = {"points": [[400, 220, 1], [380, 300.5, 0]], "box_xyxy": [300, 150, 480, 380]}
_LINES = [{"key": f"{n}/ü.jpg", "width": 640, "height": 480, "prompts": [_BOX, _POINTS]} for n in range(3)]
_POLYGON = [10.0, 10.0, 50.0, 10.0, 50.0, 40.0]
_RLE = {"size": [4, 5], "counts": [3, 4, 13]}
_INSTANCES = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 40], "segmentation": [_POLYGON], "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 3, "segmentation": _RLE, "iscrowd": 1},
    ],
    "categories": [{"id": 3, "name": "car"}],
}
_DETECTIONS = [{"image_id": 7, "category_id": 3, "bbox": [1, 2, 30, 40], "score": 0.9, "file_name": "a.jpg"}]
_YOLO = b"0 0.5 0.5 0.2 0.1\n1 0.1 0.1 0.3 0.1 0.3 0.4\n0 0.5 0.5 0.2 0.1 0.87\n2 0.5 0.5 0.2 0.1 0.3 0.3 2 0.4 0.4 1\n"
_NAMES = b"path: .\ntrain: images\nnames:\n  0: car\n  1: 'a bus'\n  2: no\nkpt_shape: [2, 3]\n"


def _text(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _read_all(address: Path) -> None:
    found = read_prompts(str(address), source="/photos", spec=find_model("sam_vit_b"), s3_endpoint=None)
    with found.stored:
        for key, prompts in found.rows():
            assert isinstance(key, str)
            assert isinstance(json.loads(prompts), list)
        json.dumps(found.as_json())


def _read_file(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts"
        path.write_bytes(data)
        _read_all(path)


def _read_folder(data: bytes) -> None:
    """A folder of labels; what is before the first form feed is the data.yaml, what is after it a label file."""
    names, _, labels = data.partition(b"\x0c")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "labels").mkdir()
        (folder / "data.yaml").write_bytes(names)
        (folder / "labels" / "a.txt").write_bytes(labels)
        (folder / "labels" / "classes.txt").write_bytes(names[:50])
        _read_all(folder)


def _read_label_map(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "map.yaml"
        path.write_bytes(data)
        read_label_map(path)


TARGETS = [
    Target(
        name="prompt files",
        read=_read_file,
        allowed=(SourceError,),
        seeds=lambda: [
            b"\n".join(map(_text, _LINES)),
            _text(_LINES),
            _text(_INSTANCES),
            json.dumps(_INSTANCES, indent=1).encode("utf-16"),
            _text(_DETECTIONS),
            b"\xef\xbb\xbf" + _text(_LINES[0]),
        ],
    ),
    Target(
        name="folders of YOLO labels",
        read=_read_folder,
        allowed=(SourceError,),
        seeds=lambda: [_NAMES + b"\x0c" + _YOLO, b"names: [car, bus, tram]\n\x0c" + _YOLO, b"\x0c" + _YOLO],
    ),
    Target(
        name="label maps",
        read=_read_label_map,
        allowed=(DetectorError,),
        seeds=lambda: [
            b"car: vehicle\nkite: null\n1.10: no\n",
            b'{"car": "vehicle", "kite": null}',
            b"a: &x b\nc: *x\n",
        ],
    ),
]
