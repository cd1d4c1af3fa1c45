"""Measures prompts through our path: sam_nano's masks on unseen scenes, and prompts a second against SamPredictor.

`python tests/benchmarks/prompts.py [--json] [--scenes 100]`. Masks are made as in a job: a prompt file is read
and checked, put on the image, decoded. Times are CPU seconds of one thread. Ours and a plain SamPredictor loop take
turns in this process over the same images and prompts. Both encode each image once and end with COCO run lengths.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from orchestrator.prompts.files import read_prompts
from tests.pixels import decode_counts
from workers.masks import Mask
from workers.models import nano
from workers.models.registry import find_model
from workers.models.sam import SamModel
from workers.params import PromptParams
from workers.prompts import Prompt, asks_one_point, fit_all
from workers.training.scenes import Scene, draw_scene

FIRST_SEED = 8_000_000_000_000  # training draws below 2 ** 40
SIZES_HW = ((480, 640), (640, 480), (512, 512), (375, 500))
PHOTO_HW = (3000, 4000)  # the size of a phone's photo
BOXES_AN_IMAGE = 50
ROUNDS = 3
INCLUDED = 0.5  # of a neighbour; a mask that covers this much of it includes it wrongly

Asked = dict[str, list[dict[str, Any]]]


@dataclass(slots=True)
class Figures:
    box_ious: list[float] = field(default_factory=list)
    point_ious: list[float] = field(default_factory=list)
    corrected: list[bool] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--scenes", type=int, default=100, help="how many scenes to draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    sam = nano.load_sam_nano("cpu").requires_grad_(False)
    figures = Figures()
    for n in range(args.scenes):
        measure_scene(sam, draw_scene(FIRST_SEED + n, SIZES_HW[n % len(SIZES_HW)]), figures)
    rows = [
        row("boxes through a prompt file, mean IoU", np.mean(figures.box_ious), 0.90),
        row("one positive point, mean IoU of the single best mask", np.mean(figures.point_ious), 0.80),
        row(
            f"a negative point on an included neighbour raises the IoU, share of {len(figures.corrected)} cases",
            np.mean(figures.corrected) if figures.corrected else None,
            0.80,
        ),
        row(f"least IoU with SamPredictor over {len(figures.agreements)} prompts", min(figures.agreements), 0.99),
        speed_row(sam, PHOTO_HW, BOXES_AN_IMAGE, 5.0),
        speed_row(sam, PHOTO_HW, 1, 1.0),
        speed_row(sam, SIZES_HW[0], BOXES_AN_IMAGE, None),
        speed_row(sam, SIZES_HW[0], 1, 1.0),
    ]
    print(json.dumps({"bars": rows}, indent=1) if args.json else table(rows))
    sys.exit(0 if all(r["holds"] for r in rows) else 1)


def measure_scene(sam: Sam, scene: Scene, figures: Figures) -> None:
    """A box and a point for each object, and a second point if the first one's mask includes a neighbour."""
    model, predictor = SamModel(sam), SamPredictor(sam)
    predictor.set_image(scene.image)
    masks = scene.masks
    clicks = [[*innermost_xy(mask), 1] for mask in masks]
    found = answer(model, scene.image, [{"box_xyxy": box_xyxy(m)} for m in masks] + [{"points": [c]} for c in clicks])
    boxed, pointed = found[: len(masks)], found[len(masks) :]
    figures.box_ious += [iou(a, b) for (a, _), b in zip(boxed, masks, strict=True)]
    figures.point_ious += [iou(a, b) for (a, _), b in zip(pointed, masks, strict=True)]
    figures.agreements += [iou(pixels, by_predictor(predictor, prompt)) for pixels, prompt in found]
    wrong = [(n, worst_neighbour(masks, n, pointed[n][0])) for n in range(len(masks))]
    cases = [(n, other) for n, other in wrong if other is not None]
    if cases:
        corrections = [{"points": [clicks[n], [*innermost_xy(masks[other] & pointed[n][0]), 0]]} for n, other in cases]
        for (n, _), (after, _) in zip(cases, answer(model, scene.image, corrections), strict=True):
            figures.corrected.append(iou(after, masks[n]) > iou(pointed[n][0], masks[n]))


def answer(model: SamModel, image: np.ndarray, prompts: list[dict[str, Any]]) -> list[tuple[np.ndarray, Prompt]]:
    """Pixels of each prompt's mask. The prompts are written to a file and read like a job's."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write(json.dumps({"key": "scene.png", "prompts": prompts}, default=float) + "\n")
        file.flush()
        read = read_prompts(file.name, source="/", spec=find_model("sam_nano"), s3_endpoint=None)
    with read.stored:
        [(_, stored)] = read.rows()
    size_hw = image.shape[:2]
    usable, wrong = fit_all(json.loads(stored), size_hw[::-1])
    assert not wrong, wrong
    asked = list(usable.values())
    found = model.prompted(image, model.embed([image])[0], asked, PromptParams())
    return [(decode_counts(mask.counts, size_hw), prompt) for [mask], prompt in zip(found, asked, strict=True)]


def by_predictor(predictor: SamPredictor, prompt: Prompt) -> np.ndarray:
    points = np.array([[x, y] for x, y, _ in prompt.points]) if prompt.points else None
    labels = np.array([inside for _, _, inside in prompt.points]) if prompt.points else None
    box = np.array(prompt.box_xyxy) if prompt.box_xyxy else None
    masks, scores, _ = predictor.predict(points, labels, box=box, multimask_output=asks_one_point(prompt))
    return masks[scores.argmax()]


def worst_neighbour(masks: np.ndarray, number: int, found: np.ndarray) -> int | None:
    taken = [0 if n == number else (found & mask).sum() / mask.sum() for n, mask in enumerate(masks)]
    worst = int(np.argmax(taken))
    return worst if taken[worst] >= INCLUDED else None


def speed_row(sam: Sam, size_hw: tuple[int, int], boxes_an_image: int, bar: float | None) -> dict[str, object]:
    """Our prompts a CPU second divided by those of a SamPredictor loop. Both take turns; the median of the rounds."""
    model, predictor = SamModel(sam), SamPredictor(sam)
    images = list(boxed_images(size_hw, boxes_an_image))
    ours, theirs = [], []
    for _ in range(ROUNDS):
        started = time.process_time()
        for image, boxes in images:
            loop(predictor, image, boxes)
        between = time.process_time()
        for image, boxes in images:
            run(model, image, boxes)
        theirs.append(between - started)
        ours.append(time.process_time() - between)
    prompts = boxes_an_image * len(images)
    name = (
        f"{boxes_an_image} boxes an image of {size_hw[1]} x {size_hw[0]}, times SamPredictor's "
        f"{prompts / np.median(theirs):.1f} prompts a CPU second"
    )
    return row(name, float(np.median(theirs) / np.median(ours)), bar)


def boxed_images(size_hw: tuple[int, int], count: int) -> Iterator[tuple[np.ndarray, list[list[float]]]]:
    """Scenes of this size and the boxes of their objects, repeated a few pixels aside until there are `count`."""
    for n in range(2 if count > 1 else 4):
        scene = draw_scene(FIRST_SEED + 1000 + n, SIZES_HW[0])
        scale = np.array([size_hw[1] / 640, size_hw[0] / 480] * 2)
        boxes = [box_xyxy(mask) for mask in scene.masks]
        moved = [(np.array(boxes[k % len(boxes)]) + k // len(boxes)) * scale for k in range(count)]
        image = cv2.resize(scene.image, size_hw[::-1], interpolation=cv2.INTER_CUBIC)
        yield image, [box.tolist() for box in moved]


def loop(predictor: SamPredictor, image: np.ndarray, boxes: list[list[float]]) -> list[Any]:
    predictor.set_image(image)
    found = []
    for box in boxes:
        masks, _, _ = predictor.predict(box=np.array(box), multimask_output=False)
        found.append(coco_mask.encode(np.asfortranarray(masks[0].view(np.uint8))))
    return found


def run(model: SamModel, image: np.ndarray, boxes: list[list[float]]) -> list[list[Mask]]:
    prompts = [Prompt(box_xyxy=(x0, y0, x1, y1)) for x0, y0, x1, y1 in boxes]
    return model.prompted(image, model.embed([image])[0], prompts, PromptParams())


def iou(one: np.ndarray, other: np.ndarray) -> float:
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


def innermost_xy(mask: np.ndarray) -> list[int]:
    """The pixel farthest from the mask's border, as SAM's authors click (paper, section 7.1)."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = divmod(int(depth.argmax()), mask.shape[1])
    return [x, y]


def box_xyxy(mask: np.ndarray) -> list[int]:
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return [x, y, x + w, y + h]


def row(name: str, value: float | None, bar: float | None) -> dict[str, object]:
    """One line of the report. Without a bar it is only shown, and holds."""
    holds = bar is None or (value is not None and bool(value >= bar))
    return {"name": name, "value": None if value is None else round(float(value), 4), "bar": bar, "holds": holds}


def table(rows: list[dict[str, object]]) -> str:
    lines = [f"{'value':>8}  {'bar':>5}  holds  name"]
    for r in rows:
        bar = "" if r["bar"] is None else r["bar"]
        lines.append(f"{r['value']!s:>8}  {bar!s:>5}  {'yes' if r['holds'] else 'NO':5}  {r['name']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
