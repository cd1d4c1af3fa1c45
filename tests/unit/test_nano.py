"""sam_nano: the shipped file is the one named, it finds what was drawn, and its trainer computes what SAM computes."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from segment_anything import SamPredictor

from workers.models import nano
from workers.training.nano_data import Batch, Prompts
from workers.training.nano_forward import decode, encode
from workers.training.nano_plan import Plan
from workers.training.scenes import draw_scene
from workers.training.train_nano import init_weights, save_run, start_run, train

UNSEEN_SEED = 7_000_000_000_000


def test_the_shipped_weights_are_those_named_and_small():
    content = nano.WEIGHTS_PATH.read_bytes()

    assert hashlib.sha256(content).hexdigest() == nano.WEIGHTS_SHA256
    assert len(content) <= 8_000_000


def test_other_bytes_under_the_shipped_name_are_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "sam_nano.safetensors"
    damaged.write_bytes(nano.WEIGHTS_PATH.read_bytes()[:-1] + b"\0")
    monkeypatch.setattr(nano, "WEIGHTS_PATH", damaged)

    with pytest.raises(ValueError, match="sha256"):
        nano.load_sam_nano("cpu", damaged)


@pytest.mark.slow
def test_a_click_and_a_box_give_the_drawn_object():
    model = nano.load_sam_nano("cpu")
    clicked, boxed = [], []

    for seed in range(2):
        scene = draw_scene(UNSEEN_SEED + seed, (256, 256))
        predictor = SamPredictor(model)
        predictor.set_image(scene.image)
        for mask in scene.masks:
            y, x = np.argwhere(mask)[mask.sum() // 2]
            three, _, _ = predictor.predict(np.array([[x, y]]), np.array([1]))
            clicked.append(max(_iou(one, mask) for one in three))
            ys, xs = np.nonzero(mask)
            box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            boxed.append(_iou(predictor.predict(box=box, multimask_output=False)[0][0], mask))

    assert np.mean(clicked) >= 0.8
    assert np.mean(boxed) >= 0.85


@pytest.mark.slow
def test_the_trainer_computes_what_segment_anything_computes():
    torch.manual_seed(0)
    model = init_weights(nano.build_sam_nano()).eval()
    image = torch.randint(0, 256, (3, 256, 256)).float()
    points = torch.tensor([[[40.0, 50.0]], [[200.0, 9.0]]])
    batch = Batch(
        images=model.preprocess(image)[None],
        targets=torch.empty(0),
        boxes_xyxy=torch.empty(0),
        background=torch.empty(0),
        offset_xy=(0, 0),
    )

    with torch.no_grad():
        prompts = Prompts(points=points[None], labels=torch.ones(1, 2, 1))
        logits, ious = decode(model, batch, encode(model, batch), prompts)
        record = {"image": image, "original_size": (256, 256), "point_coords": points, "point_labels": torch.ones(2, 1)}
        (expected,) = model([record], multimask_output=True)

    # The trainer's matrices multiply in bfloat16, of 8 bits.
    scale = expected["low_res_logits"].abs().max()
    assert (logits[0, :, 1:] - expected["low_res_logits"]).abs().max() < 0.05 * scale
    assert (ious[0, :, 1:] - expected["iou_predictions"]).abs().max() < 0.05


def test_training_goes_on_from_its_checkpoint(tmp_path):
    plan = Plan(out=tmp_path, seconds=60, seed=3, device="cpu", peak_rate=1e-3)
    run = start_run(plan)
    run.step, run.seconds = 5, 10.0
    save_run(run, tmp_path)

    again = start_run(plan)

    assert (again.step, again.seconds) == (5, 10.0)
    assert all(torch.equal(value, again.average[name]) for name, value in run.average.items())
    assert (tmp_path / "sam_nano.safetensors").stat().st_size <= 8_000_000


@pytest.mark.slow
def test_the_last_fit_changes_the_head_that_predicts_ious_and_nothing_else(tmp_path):
    start = nano.WEIGHTS_PATH
    plan = Plan(out=tmp_path, seconds=0, seed=3, device="cpu", peak_rate=1e-3, start=start, head_batches=1)

    train(plan)

    before, after = load_file(start), load_file(tmp_path / "sam_nano.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("mask_decoder.iou_prediction_head.") for name in changed)


def _iou(one, other):
    return (one & other).sum() / (one | other).sum()
