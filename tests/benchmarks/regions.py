"""Times masks to polygons and to brush streams against label_studio_sdk's brush encoder, at 1 and 12 megapixels.

`python tests/benchmarks/regions.py [--json]`; a minute on one core. The three take turns in one process, each with all
the masks of an image. So other load on the machine slows all three equally. Only the ratios of CPU time count.
"""

import argparse
import json
import statistics
import sys
import time

import cv2
import numpy as np
from label_studio_sdk.converter.brush import mask2rle

from orchestrator.label_studio.brush import encode_brush_counts
from orchestrator.shapes.polygons import fit_polygons
from orchestrator.shapes.runs import edges_from_counts
from workers.masks import encode_counts
from workers.training.scenes import draw_scene

SIZES_HW = ((1024, 1024), (3000, 4000))
MASKS_OF_A_KIND = 6
MIN_RATIO = 5.0
MIN_IOU = 0.98


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--rounds", type=int, default=9, help="how often each takes its turn")
    args = parser.parse_args()
    bars = [bar for size_hw in SIZES_HW for bar in measure(size_hw, args.rounds)]
    print(json.dumps({"bars": bars}, indent=1) if args.json else table(bars))
    sys.exit(0 if all(bar["holds"] for bar in bars) else 1)


def measure(size_hw, rounds):
    """The bars of one frame size. Ours start from COCO counts, as masks are stored; the SDK from uint8 pixels."""
    masks = [*drawn_masks(size_hw), *model_masks(size_hw)]
    pixels = [mask.astype(np.uint8) * 255 for mask in masks]
    counts = [encode_counts(mask) for mask in masks]
    ways = {
        "sdk": lambda: [mask2rle(mask) for mask in pixels],
        "brush": lambda: [encode_brush_counts(text, size_hw) for text in counts],
        "polygon": lambda: fit_polygons(
            [edges_from_counts(text, size_hw) for text in counts], size_hw, min_iou=MIN_IOU
        ),
    }
    found = {name: way() for name, way in ways.items()}
    turns = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            way()
            turns[name].append(time.process_time() - started)
    spent = {name: statistics.median(seconds) * 1000 / len(masks) for name, seconds in turns.items()}

    frame = f"{size_hw[1]}x{size_hw[0]}"
    same = sum(a == b for a, b in zip(found["sdk"], found["brush"], strict=True))
    ious = [polygons.iou for polygons in found["polygon"]]
    vertices = [sum(len(ring) for ring in polygons.rings) for polygons in found["polygon"]]
    print(
        f"{frame}: {len(masks)} masks, CPU ms a mask: "
        + ", ".join(f"{name} {ms:.2f}" for name, ms in spent.items())
        + f"; IoU mean {statistics.mean(ious):.4f}; {statistics.mean(vertices):.0f} vertices, at most {max(vertices)}",
        file=sys.stderr,
    )
    return [
        bar(f"brush, times the SDK, {frame}", spent["sdk"] / spent["brush"], MIN_RATIO),
        bar(f"polygon, times the SDK's brush, {frame}", spent["sdk"] / spent["polygon"], MIN_RATIO),
        bar(f"worst IoU of a polygon, {frame}", min(ious), MIN_IOU),
        bar(f"share of brush streams equal to the SDK's, {frame}", same / len(masks), 1.0),
    ]


def drawn_masks(size_hw):
    """Objects of a drawn scene, clean to the pixel."""
    return list(draw_scene(1, size_hw).masks[:MASKS_OF_A_KIND])


def model_masks(size_hw):
    """Masks as SAM makes them: scores on a grid of 256, resized to the frame, cut at 0; uneven, with holes."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    for _ in range(MASKS_OF_A_KIND):
        centre, radii = random.uniform(80, 176, 2), random.uniform(24, 48, 2)
        scores = 1 - np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1])
        scores += cv2.GaussianBlur(random.normal(0, 1, (256, 256)), (0, 0), 2)
        yield cv2.resize(scores, size_hw[::-1], interpolation=cv2.INTER_LINEAR) > 0


def bar(name, value, least):
    return {"name": name, "value": round(value, 4), "bar": least, "holds": value >= least}


def table(bars):
    return "\n".join(
        f"{'ok  ' if b['holds'] else 'FAIL'} {b['name']:<45} {b['value']:>8.3g}  (>= {b['bar']:g})" for b in bars
    )


if __name__ == "__main__":
    main()
