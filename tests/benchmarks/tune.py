"""Measures what a tuning teaches sam_nano, on images with known masks, and what a step and a relabeling cost.

`python tests/benchmarks/tune.py [--json]`: nuclei and nuts, a curve over the number of images, vit_b's costs; about an
hour of one core. `--train DIR --test DIR`: folders with images/ and ground_truth.json, nothing else is measured.
The weights are thrown away.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask

from db.settings import Settings
from orchestrator.tuning.verdict import NAMES, Measured, decide
from workers.engine.automatic import automatic_masks
from workers.engine.sam import promptable
from workers.models.nano import load_sam_nano
from workers.models.registry import find_model
from workers.params import PromptParams, automatic_params
from workers.prompts import Prompt
from workers.tuning.batch import draw_batch
from workers.tuning.gathering import Embeddings, frame_of, gather, lesson_of
from workers.tuning.judging import FOUND_IOU, judge, searched
from workers.tuning.lessons import Lesson, target_of
from workers.tuning.outcome import Judgement
from workers.tuning.plan import Plan, PlannedAsset, PlannedMask, PlannedWrong
from workers.tuning.thresholds import choose_thresholds, images_to_try
from workers.tuning.training import begin, compute_loss, train
from workers.tuning.views import copies

PHOTOS = Path(__file__).parents[3] / "shared/testdata/photos_masks"
CPU_SECONDS = 900.0  # everything that comes before the verdict
WRONG_IOU = 0.5  # a person deletes an automatic mask that fits no object better
THRESHOLDS_SHARE = 0.18  # of these seconds, left for choosing thresholds
NANO = find_model("sam_nano")
USUAL = automatic_params(NANO.defaults, {})

Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--train", type=Path, help="a folder with images/ and ground_truth.json")
    parser.add_argument("--test", type=Path, help="the same, of images that are not in --train")
    parser.add_argument("--cpu-seconds", type=float, default=CPU_SECONDS, help="of encoding and training together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("nuclei", "nuts", "curve", "costs"), help="one part")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows: list[Row] = []
    if args.train and args.test:
        rows = tuned_rows("", read_set(args.train), read_set(args.test), args.cpu_seconds, args.seed, bars={})
    else:
        for name, part in PARTS.items():
            if args.only in (None, name):
                rows += part(args.cpu_seconds, args.seed)
    print(json.dumps({"bars": rows}, indent=1) if args.json else table(rows))
    sys.exit(0 if all(row["holds"] for row in rows) else 1)


def nuclei(cpu_seconds: float, seed: int) -> list[Row]:
    assets = read_set(PHOTOS / "nuclei_dsb2018")
    bars = {"box": 0.07, "click": 0.08, "recall_times": 1.3}
    return tuned_rows("nuclei, 8 images: ", assets[:8], assets[8:], cpu_seconds, seed, bars=bars)


def nuts(cpu_seconds: float, seed: int) -> list[Row]:
    assets = read_set(PHOTOS / "nuts")
    return tuned_rows("nuts, 6 images: ", assets[:6], assets[6:], cpu_seconds / 3, seed, bars={"click": 0.1, "kept": 0})


def curve(cpu_seconds: float, seed: int) -> list[Row]:
    """The same four nuclei images judge; 2, 4 and 8 teach, each for a third of the time."""
    assets = read_set(PHOTOS / "nuclei_dsb2018")
    rows: list[Row] = []
    for count in (2, 4, 8):
        name = f"curve, {count} images: "
        rows += tuned_rows(name, assets[:count], assets[8:], cpu_seconds / 3, seed, bars={})
    return rows


def read_set(folder: Path) -> list[tuple[Path, PlannedAsset]]:
    """The images of a folder in the order of their names, with their true masks."""
    document = json.loads((folder / "ground_truth.json").read_text())
    images = folder / document.get("image_dir", "images")
    found = []
    for entry in sorted(document["images"], key=lambda entry: entry["file_name"]):
        masks = [
            PlannedMask(counts=one["segmentation"]["counts"], label=one["category"])
            for one in entry["instances"]
            if not one.get("iscrowd") and one.get("area", 1)
        ]
        size_hw = (entry["height"], entry["width"])
        asset = PlannedAsset(key=entry["file_name"], etag="", size_hw=size_hw, embedding=None, masks=masks)
        found.append((images, asset))
    return found


def tuned_rows(
    name: str,
    teaching: Sequence[tuple[Path, PlannedAsset]],
    judging: Sequence[tuple[Path, PlannedAsset]],
    cpu_seconds: float,
    seed: int,
    *,
    bars: dict[str, float],
) -> list[Row]:
    """Tune on some images, judge on others, and compare with the bars."""
    began = time.process_time()
    sam = load_sam_nano("cpu")
    sam.requires_grad_(False)
    model = promptable(sam, fold_from_dim=0)
    with TemporaryDirectory() as folder:
        plans = [plan_of(part, seed) for part in (teaching, judging)]
        taught, judged = (Embeddings(plan, model, Path(folder), None) for plan in plans)
        gathered = [
            [one for _, one in gather(plan, model, kept, Settings())]
            for plan, kept in zip(plans, (taught, judged), strict=True)
        ]
        assert all(not isinstance(one, str) for part in gathered for one in part), gathered
        lessons = [lesson_of(with_deleted(one, model, taught)) for one in gathered[0]]
        lessons += copies(
            plans[0], model, taught, gathered[0], Settings(), seconds=cpu_seconds, clock=time.process_time
        )
        lessons = [lesson for lesson in lessons if lesson.targets]
        run = begin(sam, seed)
        left = (1 - THRESHOLDS_SHARE) * cpu_seconds - (time.process_time() - began)
        for _ in train(
            run, lessons, lambda lesson: taught.of(lesson.number, lesson.view), seconds=left, clock=time.process_time
        ):
            if run.step % 100 == 0:
                print(f"{name}step {run.step}, {run.seconds:.0f} of {left:.0f} s", file=sys.stderr, flush=True)
        sam.mask_decoder.load_state_dict(run.kept())
        images = images_to_try(gathered[0], taught, seconds=cpu_seconds, clock=time.process_time)
        choice = choose_thresholds(promptable(sam, fold_from_dim=0), images, USUAL, USUAL)
        spent = time.process_time() - began
        automatic = (USUAL, replace(USUAL, **choice.defaults))
        judgements = [judge_both(run, one, judged, automatic) for one in gathered[1]]
    measured = decide(judgements).measured
    print(f"{name}{run.step} steps", {key: round(found.gain, 3) for key, found in measured.items()}, file=sys.stderr)
    print(f"{name}thresholds", json.dumps(choice.as_json()), file=sys.stderr)
    cost = row(f"{name}CPU s before the verdict, of {cpu_seconds:.0f}", spent, None)
    return [cost, *rows_of(name, measured, bars), row_with_crops(name, run, judging, automatic)]


def plan_of(assets: Sequence[tuple[Path, PlannedAsset]], seed: int) -> Plan:
    return Plan(
        name="measured",
        model=NANO.name,
        weights_sha256=NANO.sha256,
        job=0,
        project=0,
        server="",
        source=str(assets[0][0]),
        seed=seed,
        assets=[asset for _, asset in assets],
    )


def with_deleted(one, model, embeddings):
    """The asset with the prompts of those automatic masks that a person would delete."""
    asset = one.asset
    blank = np.zeros((*asset.size_hw, 3), np.uint8)
    found = automatic_masks(model, blank, USUAL, embedding=embeddings.of(one.number))
    best = ious_of(found, asset).max(axis=1, initial=0)
    points = [mask.prompt["points"][0] for mask, iou in zip(found, best, strict=True) if iou < WRONG_IOU]
    wrong = [PlannedWrong(point_xy=(x, y)) for x, y, _ in points]
    return replace(one, asset=asset.model_copy(update={"wrong": wrong}))


def ious_of(found, asset):
    """IoUs (masks, objects) of automatic masks with an asset's true ones."""
    made, truth = (
        [{"size": list(asset.size_hw), "counts": mask.counts.encode()} for mask in masks]
        for masks in (found, asset.masks)
    )
    return np.asarray(coco_mask.iou(made, truth, [0] * len(truth))).reshape(len(made), len(truth))


def row_with_crops(name, run, judging, automatic):
    """Times as many objects found, when both look at the four overlapping quarters of an image too."""
    found, objects = [0, 0], sum(len(asset.masks) for _, asset in judging)
    for when, (weights, params) in enumerate(zip((run.start, run.kept()), automatic, strict=True)):
        run.sam.mask_decoder.load_state_dict(weights)
        model = promptable(run.sam, fold_from_dim=0)
        for folder, asset in judging:
            image = cv2.cvtColor(cv2.imread(str(folder / asset.key)), cv2.COLOR_BGR2RGB)
            masks = automatic_masks(model, image, replace(params, crop_n_layers=1))
            found[when] += int((ious_of(masks, asset).max(axis=0, initial=0) >= FOUND_IOU).sum())
    before, after = found
    said = f"with crop_n_layers 1, times: {before} to {after} of {objects}"
    return row(f"{name}automatic recall {said}", after / max(before, 1), None)


def judge_both(run, one, embeddings, automatic):
    masks = [mask for mask in one.masks() if mask.any()]
    answers, found = [], []
    for weights, params in zip((run.start, run.kept()), automatic, strict=True):
        run.sam.mask_decoder.load_state_dict(weights)
        model, embedding = promptable(run.sam, fold_from_dim=0), embeddings.of(one.number)
        answers.append(judge(model, embedding, masks))
        found.append(searched(model, embedding, masks, params))
    judgement = Judgement.of(one.asset, list(range(len(masks))), *answers)
    return judgement.with_automatic(judgement.labels, *found)


def rows_of(name: str, measured: dict[str, Measured], bars: dict[str, float]) -> list[Row]:
    rows = []
    for key, found in measured.items():
        interval = f"{found.before:.3f} to {found.after:.3f}, interval {found.low:+.3f} to {found.high:+.3f}"
        rows.append(row(f"{name}{NAMES[key]}: {interval}", found.gain, bars.get(key)))
        if key in bars:
            rows.append(row(f"{name}{NAMES[key]}, the interval's lower end", found.low, 0.0))
    if "recall_times" in bars:
        recall = measured["recall"]
        times = recall.after / recall.before if recall.before else 0.0
        rows.append(row(f"{name}automatic recall, times", times, bars["recall_times"]))
    if "kept" in bars:
        rows.append(row(f"{name}box, the interval's upper end", measured["box"].high, bars["kept"]))
    return rows


def costs(cpu_seconds: float, seed: int) -> list[Row]:
    """vit_b with random weights: a step from stored embeddings beside one with the encoder in it, and a relabeling."""
    from workers.models.sam import ARCHITECTURES, SamModel

    torch.manual_seed(seed)
    sam = ARCHITECTURES["sam_vit_b"]().eval()
    sam.requires_grad_(False)
    model = SamModel(sam)
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 255, (683, 1024, 3), np.uint8)
    encode_seconds, [embedding] = timed(lambda: model.embed([image]))
    frame = frame_of(promptable(sam), (683, 1024))
    discs = [cv2.circle(np.zeros((683, 1024), np.uint8), (60 + 90 * n, 300), 40, 1, -1) > 0 for n in range(5)]
    lesson = Lesson(number=0, frame=frame, targets=[target for disc in discs if (target := target_of(disc, frame))])
    run = begin(sam, seed)

    def step() -> None:
        drawn = np.random.default_rng(1)
        batch = draw_batch(drawn, [lesson], "cpu")
        loss, _ = compute_loss(run.sam, drawn, batch, embedding)
        torch.autograd.backward(loss)
        run.optimizer.step()

    step()
    step_seconds, _ = timed(step)
    prompts = 2 * 4 + 2
    boxes = [Prompt(box_xyxy=(20.0 + 80 * n, 260.0, 100.0 + 80 * n, 340.0)) for n in range(12)]
    prompted_seconds, _ = timed(lambda: model.prompted(image, embedding, boxes, PromptParams()))
    params = automatic_params({}, {"points_per_side": 8})
    automatic_seconds, _ = timed(lambda: model.automatic(image, embedding, params))
    return [
        row(f"vit_b, a step of {prompts} prompts from a stored embedding, CPU s", step_seconds, None),
        row("vit_b, the same step with the encoder in it, CPU s", step_seconds + encode_seconds, None),
        row("vit_b, relabeling with 12 boxes from a stored embedding, CPU s an image", prompted_seconds, None),
        row(
            "vit_b, 12 boxes, the whole pipeline over relabeling from stored embeddings, times",
            (encode_seconds + prompted_seconds) / prompted_seconds,
            5.0,
        ),
        row(
            "vit_b, automatic masks from 64 points, the same, times (more points: less)",
            (encode_seconds + automatic_seconds) / automatic_seconds,
            None,
        ),
    ]


PARTS = {"nuclei": nuclei, "nuts": nuts, "curve": curve, "costs": costs}


def timed(work):
    """CPU seconds of this process, and what `work` returned."""
    began = time.process_time()
    made = work()
    return time.process_time() - began, made


def row(name: str, value: float, bar: float | None) -> Row:
    """One line of the report. Without a bar it is only shown, and holds."""
    return {"name": name, "value": round(value, 4), "bar": bar, "holds": bar is None or value >= bar}


def table(rows: list[Row]) -> str:
    lines = [f"{'value':>9}  {'bar':>5}  holds  name"]
    for r in rows:
        bar = "" if r["bar"] is None else r["bar"]
        lines.append(f"{r['value']!s:>9}  {bar!s:>5}  {'yes' if r['holds'] else 'NO':5}  {r['name']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
