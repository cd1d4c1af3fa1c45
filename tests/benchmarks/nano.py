"""Measures sam_nano on drawn scenes that it was never trained on, and its recall on real nuclei.

`python tests/benchmarks/nano.py [--json]`; minutes on one core. Scenes come from seeds that training does not draw.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from workers.engine.automatic import automatic_masks
from workers.models import nano
from workers.models.registry import MODELS
from workers.params import AutomaticParams
from workers.training.scenes import Scene, draw_scene

FIRST_SEED = 9_000_000_000_000  # training draws below 2 ** 40
SIZES_HW = ((512, 512), (384, 512), (512, 384), (448, 576), (640, 480))
LEAST_SIDE_PX = 32
MATCH_IOU = 0.75
NUCLEI = Path(__file__).parents[3] / "shared/testdata/photos_masks/nuclei_dsb2018"


@dataclass(slots=True)
class Figures:
    """One entry for each object, click's mask or correction, and counts over all scenes."""

    click_ious: list[float] = field(default_factory=list)
    picked_ious: list[float] = field(default_factory=list)
    centre_ious: list[float] = field(default_factory=list)
    box_ious: list[float] = field(default_factory=list)
    predicted_ious: list[float] = field(default_factory=list)
    true_ious: list[float] = field(default_factory=list)
    corrected: list[bool] = field(default_factory=list)
    found: list[bool] = field(default_factory=list)
    mask_count: int = 0
    object_count: int = 0
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--scenes", type=int, default=100, help="how many scenes to draw")
    parser.add_argument("--weights", type=Path, default=nano.WEIGHTS_PATH, help="another weights file")
    parser.add_argument("--no-automatic", action="store_true", help="leave out what takes minutes")
    args = parser.parse_args()
    model = nano.load_sam_nano("cpu", args.weights)
    figures = Figures()
    for scene in draw_scenes(args.scenes):
        measure_prompts(model, scene, figures)
        if not args.no_automatic:
            measure_automatic(model, scene, figures)
    rows = bars(figures)
    if not args.no_automatic:
        rows.append(nuclei_row(model))
    print(json.dumps({"bars": rows}, indent=1) if args.json else table(rows))
    sys.exit(0 if all(row["holds"] for row in rows) else 1)


def draw_scenes(count: int) -> Iterator[Scene]:
    for index in range(count):
        yield draw_scene(FIRST_SEED + index, SIZES_HW[index % len(SIZES_HW)])


def measure_prompts(model: Sam, scene: Scene, figures: Figures) -> None:
    """A click, the innermost click, a box and a correction for each object."""
    rng = np.random.default_rng(scene.object_count)
    predictor = SamPredictor(model)
    predictor.set_image(scene.image)
    masks = scene.masks
    clicks = np.array([random_pixel_xy(rng, mask) for mask in masks])
    best, predicted = click(predictor, clicks[:, None], np.ones((len(clicks), 1)))
    ious = np.array([[iou(candidate, mask) for candidate in three] for three, mask in zip(best, masks, strict=True)])
    picked = predicted.argmax(axis=1)
    figures.click_ious += ious.max(axis=1).tolist()
    figures.picked_ious += ious[np.arange(len(ious)), picked].tolist()
    figures.predicted_ious += predicted.ravel().tolist()
    figures.true_ious += ious.ravel().tolist()
    centres = np.array([innermost_xy(mask) for mask in masks])
    three_of_centre, _ = click(predictor, centres[:, None], np.ones((len(centres), 1)))
    figures.centre_ious += [max(iou(c, m) for c in three) for three, m in zip(three_of_centre, masks, strict=True)]
    boxed = box(predictor, np.array([box_xyxy(mask) for mask in masks]))
    figures.box_ious += [iou(found, mask) for found, mask in zip(boxed, masks, strict=True)]
    for index in range(len(masks)):
        before = best[index, picked[index]]
        correct_neighbour(predictor, scene, index, clicks[index], before, figures)


def correct_neighbour(
    predictor: SamPredictor, scene: Scene, index: int, click_xy: np.ndarray, before: np.ndarray, figures: Figures
) -> None:
    """If a click's mask covers half of another object or more: does a negative click on that object help?"""
    masks = scene.masks
    taken = [(before & other).sum() / other.sum() if i != index else 0 for i, other in enumerate(masks)]
    worst = int(np.argmax(taken))
    if taken[worst] < 0.5:
        return
    points = np.stack([click_xy, innermost_xy(masks[worst] & before)])[None]
    after, _ = click(predictor, points, np.array([[1, 0]]), multimask=False)
    figures.corrected.append(iou(after[0, 0], masks[index]) > iou(before, masks[index]))


def measure_automatic(model: Sam, scene: Scene, figures: Figures) -> None:
    started = time.perf_counter()
    made = find_all(model, scene.image)
    figures.seconds.append(time.perf_counter() - started)
    figures.mask_count += len(made)
    figures.object_count += scene.object_count
    sides = [box[2:] - box[:2] for box in map(box_xyxy, scene.masks)]
    truth = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in scene.masks]
    matched = are_found(made, truth)
    figures.found += [found for found, side in zip(matched, sides, strict=True) if side.max() >= LEAST_SIDE_PX]


def find_all(model: Sam, image: np.ndarray) -> list[dict[str, object]]:
    """Automatic masks with the shipped defaults, as COCO run lengths."""
    masks = automatic_masks(model, image, AutomaticParams(**MODELS["sam_nano"].defaults))
    return [{"size": list(mask.size_hw), "counts": mask.counts} for mask in masks]


def are_found(made: list[dict[str, object]], truth: list[dict[str, object]]) -> list[bool]:
    """Whether each true mask has a found mask at MATCH_IOU or better."""
    if not made or not truth:
        return [False] * len(truth)
    return (np.max(coco_mask.iou(made, truth, [0] * len(truth)), axis=0) >= MATCH_IOU).tolist()


def click(
    predictor: SamPredictor, points: np.ndarray, labels: np.ndarray, multimask: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """From points (P, N, 2) xy and labels (P, N) to masks (P, M, H, W) bool and predicted IoU (P, M)."""
    coords = predictor.transform.apply_coords(points.astype(float), predictor.original_size)
    with torch.inference_mode():
        masks, ious, _ = predictor.predict_torch(
            torch.as_tensor(coords, dtype=torch.float), torch.as_tensor(labels), multimask_output=multimask
        )
    return masks.numpy(), ious.numpy()


def box(predictor: SamPredictor, boxes: np.ndarray) -> np.ndarray:
    """From boxes (P, 4) xyxy to the single masks (P, H, W) bool."""
    coords = predictor.transform.apply_boxes(boxes.astype(float), predictor.original_size)
    with torch.inference_mode():
        masks, _, _ = predictor.predict_torch(
            None, None, torch.as_tensor(coords, dtype=torch.float), multimask_output=False
        )
    return masks[:, 0].numpy()


def iou(one: np.ndarray, other: np.ndarray) -> float:
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 0.0


def random_pixel_xy(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Any pixel of the mask, also at its edge. This is harder than where a person clicks."""
    inside = np.flatnonzero(mask)
    y, x = divmod(int(inside[rng.integers(len(inside))]), mask.shape[1])
    return np.array([x, y])


def innermost_xy(mask: np.ndarray) -> np.ndarray:
    """The pixel farthest from the mask's border, as SAM's authors click (paper, section 7.1)."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = divmod(int(depth.argmax()), mask.shape[1])
    return np.array([x, y])


def box_xyxy(mask: np.ndarray) -> np.ndarray:
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return np.array([x, y, x + w, y + h])


def bars(figures: Figures) -> list[dict[str, object]]:
    rows = [
        row("one click inside, mean IoU of the best of three", mean(figures.click_ious), 0.85),
        row("a box, mean IoU", mean(figures.box_ious), 0.90),
        row(
            "Pearson of predicted and true IoU",
            float(np.corrcoef(figures.predicted_ious, figures.true_ious)[0, 1]),
            0.6,
        ),
        row("one click inside, mean IoU of the mask predicted best", mean(figures.picked_ious), 0.80),
        row("click on the innermost pixel, mean IoU of the best of three", mean(figures.centre_ious), None),
    ]
    if figures.corrected:
        name = f"a negative click on an included neighbour raises the IoU, share of {len(figures.corrected)} cases"
        rows.append(row(name, mean(figures.corrected), 0.80))
    if figures.object_count:
        rows += [
            row(
                f"automatic masks, recall at IoU {MATCH_IOU} of objects of {LEAST_SIDE_PX} px",
                mean(figures.found),
                0.80,
            ),
            row("automatic masks an object", figures.mask_count / figures.object_count, 1.5, at_most=True),
            row("automatic masks, seconds an image", mean(figures.seconds), None),
        ]
    return rows


def nuclei_row(model: Sam) -> dict[str, object]:
    name = f"automatic masks, recall at IoU {MATCH_IOU} on nuclei_dsb2018"
    if not NUCLEI.exists():
        return row(f"{name}: skipped, no {NUCLEI}", None, None)
    document = json.loads((NUCLEI / "ground_truth.json").read_text())
    found: list[bool] = []
    for entry in document["images"]:
        image = cv2.imread(str(NUCLEI / document["image_dir"] / entry["file_name"]))
        truth = [instance["segmentation"] for instance in entry["instances"]]
        found += are_found(find_all(model, cv2.cvtColor(image, cv2.COLOR_BGR2RGB)), truth)
    return row(f"{name}, {len(found)} nuclei", mean(found), None)


def row(name: str, value: float | None, bar: float | None, *, at_most: bool = False) -> dict[str, object]:
    """One line of the report. Without a bar it is only shown, and holds."""
    holds = True if bar is None or value is None else (value <= bar if at_most else value >= bar)
    return {"name": name, "value": None if value is None else round(value, 4), "bar": bar, "holds": holds}


def mean(values: list[float] | list[bool]) -> float:
    return float(np.mean(values))


def table(rows: list[dict[str, object]]) -> str:
    lines = [f"{'value':>8}  {'bar':>5}  holds  name"]
    for r in rows:
        bar = "" if r["bar"] is None else r["bar"]
        lines.append(f"{r['value']!s:>8}  {bar!s:>5}  {'yes' if r['holds'] else 'NO':5}  {r['name']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
