"""An ONNX detector with known answers: it finds the boxes of pure blue, green and red in an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = ("blue", "green", "red")
SCORES = (0.9, 0.8, 0.7)


def write_colour_detector(
    path: Path,
    *,
    size_hw: tuple[int | str, int | str] = (160, 192),
    batch: int | str | None = 1,
    constant: Sequence[tuple[float, float, float, float, float, int]] = (),
    metadata: str | None = None,
    classes: str | None = None,
) -> Path:
    """Write a graph with mmdeploy's outputs: for each colour x0, y0, x1, y1 in the input's pixels and a score.

    The input is normalised for RTMDet, BGR: above 2 a channel is full, below -1 it is empty. constant: more boxes (x0,
    y0, x1, y1, score, class number), which it gives for every image. batch: the number of images at once; a name means
    any number; None means one image, with outputs (k, 5) and (k,).
    """
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def make(op: str, inputs: Sequence[str], **attributes: object) -> str:
        name = f"{op}{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def value(array: object, kind: type) -> str:
        name = f"c{len(constants)}"
        constants.append(numpy_helper.from_array(np.array(array, kind), name))
        return name

    full, empty = value(2, np.float32), value(-1, np.float32)
    rows = []
    for colour, score in enumerate(SCORES):
        channels = [make("Gather", ["image", value(c, np.int64)], axis=1) for c in range(3)]
        inside = [
            make("Greater", [channel, full]) if c == colour else make("Less", [channel, empty])
            for c, channel in enumerate(channels)
        ]
        pixels = make("Cast", [make("And", [make("And", inside[:2]), inside[2]])], to=TensorProto.FLOAT)
        across = make("ReduceMax", [pixels, value([1], np.int64)], keepdims=0)
        down = make("ReduceMax", [pixels, value([2], np.int64)], keepdims=0)
        one = value(1, np.float32)
        edges = []
        for profile in (across, down):
            first = make("ArgMax", [profile], axis=1, keepdims=1)
            last = make("ArgMax", [profile], axis=1, keepdims=1, select_last_index=1)
            edges.append((make("Cast", [first], to=TensorProto.FLOAT), make("Cast", [last], to=TensorProto.FLOAT)))
        (x0, x1), (y0, y1) = edges
        found = make("ReduceMax", [across, value([1], np.int64)], keepdims=1)
        parts = [x0, y0, make("Add", [x1, one]), make("Add", [y1, one])]
        row = make("Concat", [*parts, make("Mul", [found, value(score, np.float32)])], axis=1)
        rows.append(make("Unsqueeze", [row, value([1], np.int64)]))
    boxes = make("Concat", rows, axis=1)
    if constant:
        boxes = make("Concat", [boxes, value([[row[:5] for row in constant]], np.float32)], axis=1)
    numbers = value([[0, 1, 2, *(row[5] for row in constant)]], np.int64)
    images = make("Shape", ["image"], end=1)
    labels = make("Expand", [numbers, make("Concat", [images, value([3 + len(constant)], np.int64)], axis=0)])
    for made, name in ((boxes, "dets"), (labels, "labels")):
        make("Squeeze", [made, value([0], np.int64)]) if batch is None else make("Identity", [made])
        nodes[-1].output[0] = name

    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch or 1, 3, *size_hw])],
        [
            helper.make_tensor_value_info("dets", TensorProto.FLOAT, [batch, None, 5] if batch else [None, 5]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [batch, None] if batch else [None]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if metadata is not None:
        helper.set_model_props(model, {"names": metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    if classes is not None:
        path.with_suffix(".classes.txt").write_text(classes)
    return path
