"""A tuning's parts: the decoder's passes, the losses, the prompts, the split, the checkpoint, the verdict."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything.modeling import Sam

from db.corrections import CorrectedAsset, CorrectedMask
from db.states import Verdict
from orchestrator.tuning.install import install
from orchestrator.tuning.lessons import planned_asset
from orchestrator.tuning.process import train_and_judge
from orchestrator.tuning.verdict import decide
from tests.deployment import draw_pictures
from tests.waiting import wait_for
from workers.embeddings.address import EmbeddingFormat, EmbeddingOf
from workers.embeddings.codec import encode
from workers.embeddings.store import EmbeddingStore
from workers.engine.sam import promptable
from workers.masks import BoolMask, encode_counts
from workers.models import loading
from workers.models.nano import load_sam_nano
from workers.models.own import OwnModel, write_own
from workers.models.registry import find_model
from workers.models.spec import WeightsError
from workers.models.tuned import write_decoder
from workers.params import automatic_params
from workers.storage.objects import open_objects
from workers.training.scenes import draw_scene
from workers.tuning import batch, thresholds
from workers.tuning.checkpoint import load_run, save_run
from workers.tuning.decoding import Asked, decode
from workers.tuning.gathering import Embeddings, Gathered, hold_out
from workers.tuning.held_out import judge_held_out
from workers.tuning.judging import searched
from workers.tuning.lessons import NEAR_SIDE, Frame, Lesson, Target, WrongPrompt, target_of, turned
from workers.tuning.loss import best_of_three, focal_and_dice, look_near, near_ious, near_loss
from workers.tuning.outcome import Counted, FewAssets, Judgement, Pair, require_enough
from workers.tuning.plan import CHECKPOINT_NAME, Plan, PlannedAsset, PlannedMask, TuneError, read_plan, write_plan
from workers.tuning.prompts import draw_box, draw_click, draw_correction, middle_of
from workers.tuning.thresholds import choose_thresholds
from workers.tuning.training import begin, train
from workers.tuning.tune import DECODER_NAME, tune
from workers.tuning.views import COPIES

NANO = find_model("sam_nano")
FRAME = Frame(size_hw=(96, 128), input_hw=(192, 256), grid_hw=(128, 128), cell_px=2)


@pytest.fixture
def sam() -> Sam:
    return load_sam_nano("cpu")


def disc(x: float, y: float, radius: float, size_hw: tuple[int, int] = (96, 128)) -> BoolMask:
    rows, columns = np.mgrid[: size_hw[0], : size_hw[1]]
    found: BoolMask = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
    return found


def target(mask: BoolMask) -> Target:
    found = target_of(mask, FRAME)
    assert found is not None
    return found


def lesson() -> Lesson:
    targets = [target(disc(30, 30, 12)), target(disc(80, 50, 20))]
    return Lesson(number=0, frame=FRAME, targets=targets, wrong=[WrongPrompt(point_xy=(200.0, 20.0))])


@pytest.mark.parametrize("is_refined", [False, True])
def test_the_rearranged_decoder_gives_the_modules_own_masks_and_scores(sam: Sam, is_refined: bool) -> None:
    torch.manual_seed(1)
    embedding = torch.randn(1, 128, 32, 32)
    previous = torch.randn(1, 1, 128, 128) if is_refined else None
    points, labels = torch.rand(1, 2, 2) * 255, torch.tensor([[1.0, 0.0]])
    sparse, dense = sam.prompt_encoder(points=(points, labels), boxes=None, masks=previous)
    with torch.no_grad():
        expected = sam.mask_decoder.predict_masks(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense)

        padded = torch.cat([points, torch.zeros(1, 1, 2)], dim=1)
        asked = Asked(
            images=torch.tensor([0]), points=padded, labels=torch.tensor([[1.0, 0.0, -1.0]]), previous=previous
        )
        logits, ious = decode(sam, embedding, asked)

    assert torch.allclose(logits, expected[0], atol=1e-4, rtol=1e-4)
    assert torch.allclose(ious, expected[1], atol=1e-5)


def test_a_right_mask_costs_less_than_a_shifted_one_and_the_best_of_three_counts() -> None:
    cover = torch.from_numpy(target(disc(60, 50, 20)).cover(FRAME.grid_hw))[None]
    right = (cover * 20 - 10)[:, None]
    logits = torch.cat([right, right.roll(20, dims=3), -right], dim=1)
    losses = focal_and_dice(logits, cover)[0]

    assert losses[0] < losses[1] < losses[2]
    assert float(best_of_three(losses[None])) < float(losses.mean())


def test_an_object_smaller_than_a_cell_has_a_target_that_its_own_mask_fits() -> None:
    small = target(disc(60.5, 50.5, 1.2))
    window = torch.tensor([small.near_xyxy])
    cover = torch.from_numpy(small.near.astype(np.float32) / 255)[None]
    logits = torch.full((1, 1, 128, 128), -10.0)
    logits[0, 0, 50:52, 60:62] = 10.0  # its cells
    near = look_near(logits, window, input_px=256, side=NEAR_SIDE)
    elsewhere = look_near(logits.roll(9, dims=3), window, input_px=256, side=NEAR_SIDE)

    assert float(near_ious(logits, near, cover, window, input_px=256)) > 0.5
    assert near_loss(near, cover) < near_loss(elsewhere, cover)


def test_pixels_far_from_an_object_lower_its_iou() -> None:
    one = target(disc(30, 30, 12))
    window, cover = torch.tensor([one.near_xyxy]), torch.from_numpy(one.near.astype(np.float32) / 255)[None]
    logits = torch.from_numpy(one.cover(FRAME.grid_hw) * 20 - 10)[None, None]
    near = look_near(logits, window, input_px=256, side=NEAR_SIDE)
    both = near_ious(logits, near, cover, window, input_px=256)
    logits[..., 100:, 100:] = 10.0

    assert float(both) > 0.95
    assert float(near_ious(logits, near, cover, window, input_px=256)) < 0.6


def test_clicks_are_inside_boxes_near_and_corrections_on_the_error() -> None:
    rng = np.random.default_rng(1)
    mask = disc(60, 50, 20)
    one = target(mask)
    cover = one.cover(FRAME.grid_hw)
    for _ in range(50):
        x, y = draw_click(rng, one, FRAME.cell_px)
        assert cover[int((y + 0.5) / 2), int((x + 0.5) / 2)] > 0.5
        assert np.abs(np.array(draw_box(rng, one.box_xyxy)) - one.box_xyxy).max() <= 20
        (x, y), label = draw_correction(rng, np.where(cover > 0.5, -9, -9).astype(np.float32), cover, FRAME.cell_px)
        assert label == 1
        assert cover[int((y + 0.5) / 2), int((x + 0.5) / 2)] > 0.5
        (x, y), label = draw_correction(rng, np.full_like(cover, 9), cover, FRAME.cell_px)
        assert label == 0
        assert cover[int((y + 0.5) / 2), int((x + 0.5) / 2)] <= 0.5
    assert middle_of(mask) == (60.0, 50.0)


def test_turned_copies_are_all_different_and_keep_every_pixel() -> None:
    image = np.arange(6).reshape(2, 3)
    views = [turned(image, view) for view in (0, *COPIES)]

    assert len({(view.shape, view.tobytes()) for view in views}) == 8
    assert all(sorted(view.flat) == list(range(6)) for view in views)


def gathered(content: str, *, empty: bool = False) -> Gathered:
    masks = [] if empty else [PlannedMask(counts="", label="cell")]
    asset = PlannedAsset(key=content, etag="", size_hw=(4, 4), embedding=None, masks=masks)
    return Gathered(number=0, asset=asset, frame=FRAME, content=content, encoded=False)


def digests(count: int) -> list[str]:
    return [hashlib.sha256(str(n).encode()).hexdigest() for n in range(count)]


def contents_of(assets: Sequence[Gathered]) -> set[str]:
    return {one.content for one in assets}


def test_a_fifth_is_held_out_by_content_so_copies_of_an_image_are_on_one_side() -> None:
    sha256s = digests(100)
    teaching, judging = hold_out([gathered(one) for one in (*sha256s, *sha256s[:20])])

    assert contents_of(teaching) | contents_of(judging) == set(sha256s)
    assert not contents_of(teaching) & contents_of(judging)
    assert 10 <= len(contents_of(judging)) <= 30
    with pytest.raises(FewAssets, match="9 of 11 annotated assets can be used"):
        require_enough(9, 11, [{"key": "a.png", "error": "gone"}])


def test_an_image_stays_on_its_side_when_others_come() -> None:
    sha256s = digests(200)
    few, many = (hold_out([gathered(one) for one in sha256s[:count]]) for count in (50, 200))

    assert contents_of(few[0]) <= contents_of(many[0])
    assert contents_of(few[1]) <= contents_of(many[1])


def test_two_images_with_masks_judge_whatever_chance_holds_out() -> None:
    low, high = [f"{n:08x}" for n in range(4)], [f"ffffff{n:02x}" for n in range(10)]
    teaching, judging = hold_out([gathered(one, empty=True) for one in low] + [gathered(one) for one in high])

    assert sorted(contents_of(judging)) == [*low, *high[:2]]
    assert sorted(contents_of(teaching)) == high[2:]


def steps(run, count: int) -> None:
    ticks = iter(range(1000))
    embedding = torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(1))
    reports = train(run, [lesson()], lambda _: embedding, seconds=500.0, clock=lambda: float(next(ticks)))
    for _ in range(count):
        next(reports)


def test_a_training_that_stopped_goes_on_to_the_same_weights(
    sam: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "OBJECTS_AN_IMAGE", 1)  # it is the state that is tested
    whole = begin(sam, seed=3)
    steps(whole, 2)
    save_run(whole, tmp_path)
    resumed = begin(load_sam_nano("cpu"), seed=3)
    assert load_run(resumed, tmp_path)
    assert (resumed.step, resumed.seconds) == (whole.step, whole.seconds)

    for run in (whole, resumed):
        steps(run, 1)

    assert resumed.step == 3
    for name, value in whole.average.items():
        assert torch.allclose(value, resumed.average[name], atol=1e-6), name
    encoder = load_sam_nano("cpu").image_encoder.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in sam.image_encoder.state_dict().items())


def test_a_checkpoint_of_another_seed_or_with_damage_is_refused(sam: Sam, tmp_path: Path) -> None:
    run = begin(sam, seed=3)
    assert not load_run(run, tmp_path)
    save_run(run, tmp_path)
    with pytest.raises(TuneError, match="of seed 3 at step 0, expected seed 4"):
        load_run(replace(run, seed=4), tmp_path)
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"no tensors")
    with pytest.raises(TuneError, match="cannot be read"):
        load_run(run, tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(TuneError, match="cannot be read"):
        read_plan(tmp_path)


def test_the_process_hands_its_own_reason_to_the_command(tmp_path: Path) -> None:
    with pytest.raises(TuneError, match="no plan"):
        train_and_judge(tmp_path, seconds=1, device="cpu", listen=lambda said: None)
    assert not (tmp_path / DECODER_NAME).exists()


def test_a_disk_that_takes_nothing_is_a_reason_too(tmp_path: Path) -> None:
    write_plan(planned(), tmp_path)
    (tmp_path / "embeddings").write_text("where a folder should be")
    with pytest.raises(TuneError, match=r"cannot be written or read \(.*File exists"):
        train_and_judge(tmp_path, seconds=1, device="cpu", listen=lambda said: None)


def test_a_deleted_masks_prompt_is_planned_in_pixels() -> None:
    """YOLO's prompts are stored in fractions, COCO's in pixels of the size that its file gives."""
    prompts = [
        {"index": 0, "size_wh": [1, 1], "box_xyxy": [0.4, 0.25, 0.6, 0.75], "label": "cell"},
        {"index": 1, "size_wh": [300, 200], "box_xyxy": [120, 50, 180, 150]},
        {"index": 2, "size_wh": [1, 1], "points": [[0.5, 0.5, 1]]},
        {"points": [[300.0, 200.0, 1]]},
        {"class": "cell", "score": 0.3},
    ]
    shown = CorrectedMask(
        verdict=Verdict.DELETED, label="cell", counts=None, bbox_xywh=(250, 110, 90, 180), prompt=None
    )
    masks = [replace(shown, prompt=prompt) for prompt in prompts]
    asset = CorrectedAsset(asset_id=1, key="a.jpg", etag="", size_hw=(400, 600), masks=masks)

    wrong = planned_asset(asset, None).wrong

    assert [one.box_xyxy or one.point_xy for one in wrong] == [
        pytest.approx((240, 100, 360, 300)), pytest.approx((240, 100, 360, 300)),
        (300, 200), (300, 200), (250, 110, 340, 290),
    ]  # fmt: skip


def planned(**changes: object) -> Plan:
    known: dict[str, object] = {
        "name": "ours", "model": "sam_nano", "weights_sha256": NANO.sha256, "job": 1, "project": 7,
        "server": "http://ls.example", "source": "/nowhere", "seed": 1, "assets": [], **changes,
    }  # fmt: skip
    return Plan.model_validate(known)


def test_a_base_with_nan_and_a_base_that_is_gone_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: value.clone() for name, value in load_sam_nano("cpu").state_dict().items()}
    tensors["mask_decoder.iou_token.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "broken.safetensors")
    content = (folder / "broken.safetensors").read_bytes()
    own = OwnModel(
        name="broken",
        architecture="sam_nano",
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        parameter_count=1,
        origin="a test",
        licence="none",
        added=date(2026, 11, 26),
    )
    write_own(own)
    write_plan(planned(model="broken", weights_sha256=own.sha256), folder)
    with pytest.raises(TuneError, match="broken: NaN or infinity in 1 tensors, such as mask_decoder"):
        tune(folder, seconds=1, device="cpu")
    (folder / "broken.safetensors").unlink()
    monkeypatch.setattr(loading, "_loaded", {})  # as in a new process
    with pytest.raises(WeightsError, match="broken: no weights"):
        tune(folder, seconds=1, device="cpu")
    write_plan(planned(weights_sha256="0" * 64), folder)
    with pytest.raises(TuneError, match="sam_nano has the weights d10efaca here, the tuning began with 00000000"):
        tune(folder, seconds=1, device="cpu")


def test_a_tuned_model_has_the_chosen_defaults_and_the_next_one_keeps_them(sam: Sam, folder: Path) -> None:
    write_decoder(sam.mask_decoder.state_dict(), folder / DECODER_NAME)
    chosen = {"points_per_side": 24, "pred_iou_thresh": 0.4, "stability_score_thresh": 0.6}
    install(planned(), folder / DECODER_NAME, chosen)
    install(planned(name="next", model="ours"), folder / DECODER_NAME, {})

    assert find_model("ours").defaults == {**NANO.defaults, **chosen}
    assert find_model("next").defaults == find_model("ours").defaults
    assert "[defaults]\npoints_per_side = 24\npred_iou_thresh = 0.4\n" in (folder / "next.toml").read_text()


def test_a_kept_embedding_of_other_weights_stops_the_tuning(sam: Sam, tmp_path: Path) -> None:
    of = EmbeddingOf(
        model="sam_nano", weights_sha256=NANO.sha256, fast=False, format=EmbeddingFormat.FP16, source="s", key="a",
        etag="e",
    )  # fmt: skip
    store = EmbeddingStore(open_objects(str(tmp_path / "kept")))
    other = dataclasses.replace(of, weights_sha256=NANO.sha256[:8] + "0" * 56)
    store.write(of.address, encode(torch.zeros(1, 128, 32, 32), other))
    asset = PlannedAsset(key="a", etag="e", size_hw=(4, 4), embedding=of.address, masks=[])
    embeddings = Embeddings(planned(source="s", assets=[asset]), promptable(sam), tmp_path / "here", store)
    with pytest.raises(TuneError, match="of other weights or another image"):
        embeddings.bring(0, b"", max_pixels=100)

    store.write(of.address, encode(torch.ones(1, 128, 32, 32), of))
    assert not embeddings.bring(0, b"", max_pixels=100)
    assert float(embeddings.of(0).mean()) == 1


def judgement(
    before: float, after: float, *, box: float = 0.0, found: Pair = (1, 1), masks: Pair = (4, 3)
) -> Judgement:
    return Judgement(
        key="a",
        labels=["cell", "cell"],
        box=[(0.8, 0.8 + box)] * 2,
        click=[(before, after)] * 2,
        corrected=[(0.8, 0.8)] * 2,
        found=[found] * 2,
        found_labels=["cell", "cell"],
        masks=masks,
    )


def test_a_decoder_is_better_when_clicks_gain_and_nothing_is_lost() -> None:
    gained = [judgement(0.5, 0.5 + gain) for gain in (0.1, 0.2, 0.15, 0.12)]
    verdict = decide(gained)
    assert verdict.is_better
    click = verdict.measured["click"]
    assert click.low > 0
    assert click.low < click.gain < click.high
    assert verdict.measured["masks_an_object"].gain == pytest.approx(-0.5)
    assert set(verdict.by_label) == {"cell"}

    unsure = decide([judgement(0.5, 0.5 + gain) for gain in (0.1, -0.1, 0.02, -0.03)])
    assert not unsure.is_better
    assert "neither boxes nor clicks gain" in unsure.reasons[0]

    worse = decide([replace(one, found=[(1, 0), (1, 0)]) for one in gained])
    assert [reason for reason in worse.reasons if "recall" in reason]
    assert not worse.is_better

    flooded = decide([replace(one, masks=(3, 9)) for one in gained])
    assert flooded.measured["recall"].gain == 0
    assert flooded.reasons == ["automatic masks, F1 at IoU 0.75 fell from 0.800 to 0.364 (by 0.436 to 0.436)"]


def test_one_image_shows_no_gain_and_no_loss_whatever_its_figures_are() -> None:
    verdict = decide([judgement(0.5, 0.6)])
    assert not verdict.is_better
    assert verdict.reasons == ["neither boxes nor clicks gain beyond chance: +0.000 (one image) and +0.100 (one image)"]
    rare = replace(judgement(0.9, 0.1), labels=["rare"] * 2, found_labels=["rare"] * 2)
    assert not decide([judgement(0.5, 0.6), rare]).by_label["rare"]["click"].loses


def test_copies_of_an_image_judge_once(sam: Sam, tmp_path: Path) -> None:
    scene = draw_scene(8_000_000_000_001, (48, 64))
    ok, png = cv2.imencode(".png", scene.image)
    masks = [PlannedMask(counts=encode_counts(np.asarray(scene.masks[0], np.bool_)), label="x")]
    assets = [PlannedAsset(key=key, etag="", size_hw=(48, 64), embedding=None, masks=masks) for key in "ab"]
    plan = planned(assets=assets)
    embeddings = Embeddings(plan, promptable(sam), tmp_path, None)
    assert ok
    for number in range(2):
        embeddings.bring(number, png.tobytes(), max_pixels=10_000)
    judging = [
        Gathered(number=n, asset=asset, frame=FRAME, content="same", encoded=True) for n, asset in enumerate(assets)
    ]
    run = begin(sam, seed=1)
    sam.mask_decoder.eval().requires_grad_(False)
    usual = automatic_params(NANO.defaults, {"points_per_side": 2})

    judgements, _ = judge_held_out(plan, run, judging, embeddings, (usual, usual), say=lambda done, of: None)

    assert len(judgements) == 1


def test_a_tuning_that_could_judge_by_one_image_alone_is_refused(tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / "pictures", 12)
    mask = [PlannedMask(counts=encode_counts(disc(16, 12, 6, (24, 32))), label="x")]
    assets = [
        PlannedAsset(key=f"{n:04}.png", etag="", size_hw=(24, 32), embedding=None, masks=mask if n < 3 else [])
        for n in range(12)
    ]
    write_plan(planned(source=str(source), assets=assets), tmp_path / "tune")

    with pytest.raises(TuneError, match="at least four different images"):
        train_and_judge(tmp_path / "tune", seconds=1, device="cpu", listen=lambda said: None)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta"])
def test_a_device_of_another_kind_is_named(device: str, tmp_path: Path) -> None:
    write_plan(planned(), tmp_path)
    with pytest.raises(TuneError, match=f"--device {device}: expected auto, cpu, cuda"):
        train_and_judge(tmp_path, seconds=1, device=device, listen=lambda said: None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what a process hears cannot be seen here")
def test_ctrl_c_while_torch_is_imported_leaves_no_trace(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from orchestrator.tuning.process import TuneStopped, train_and_judge
print("begins", flush=True)
try:
    train_and_judge(Path({str(tmp_path)!r}), seconds=1, device="cpu", listen=print)
except TuneStopped:
    print("stopped")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        # A shell lets its background commands, and what they start, ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "begins\n"
        wait_for(Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text, "the process that trains")
        os.killpg(command.pid, signal.SIGINT)
        said, errors = command.communicate(timeout=120)

    assert (said, errors) == ("stopped\n", "")


def test_the_thresholds_that_are_chosen_find_what_automatic_masks_then_find(
    sam: Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thresholds, "POINTS_PER_SIDE", (6,))
    scene = draw_scene(8_000_000_000_001, (192, 256))
    masks = [np.asarray(mask, np.bool_) for mask in scene.masks]
    with torch.no_grad():  # a decoder that predicts half of the IoU
        sam.mask_decoder.iou_prediction_head.layers[-1].weight.mul_(0.5)
        sam.mask_decoder.iou_prediction_head.layers[-1].bias.mul_(0.5)
    model = promptable(sam, fold_from_dim=0)
    [embedding] = model.embed([scene.image], fast=False)
    usual = automatic_params(NANO.defaults, {"points_per_side": 4})

    own = automatic_params(NANO.defaults, {})
    choice = choose_thresholds(model, [(embedding, masks)], usual, own)

    assert choice.tried[choice.usual].found == 0
    assert choice.defaults["pred_iou_thresh"] < 0.5
    for one in (choice.chosen, replace(choice.chosen, pred_iou_thresh=0.2, stability_score_thresh=0.8)):
        found = searched(model, embedding, masks, replace(usual, **dataclasses.asdict(one)))
        assert choice.tried[one] == Counted(found=sum(found.found), masks=found.masks, objects=len(masks))
    assert choice.tried[choice.chosen].found > 0

    same = choose_thresholds(model, [], usual, own)
    assert (same.chosen, same.images) == (same.usual, 0)
    assert same.defaults == {"points_per_side": 4, "pred_iou_thresh": 0.6, "stability_score_thresh": 0.75}
    assert choose_thresholds(model, [], own, own).defaults == {}


def test_a_planned_mask_is_what_people_left() -> None:
    mask = disc(60, 50, 20)
    asset = PlannedAsset(
        key="a", etag="", size_hw=(96, 128), embedding=None, masks=[PlannedMask(counts=encode_counts(mask), label="x")]
    )
    one = Gathered(number=0, asset=asset, frame=FRAME, content="c", encoded=False)
    assert np.array_equal(one.masks()[0], mask)
