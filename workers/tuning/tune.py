"""The process of a tuning: `python -P -m workers.tuning.tune FOLDER --seconds S --device D`, for `maskfleet tune`.

It reads plan.json in the folder and leaves there decoder.safetensors and judged.json. It writes a JSON object a line on
stdout as progress. When its stdin ends or Ctrl-C comes, it stores a checkpoint after the current step and leaves.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import torch
from safetensors import SafetensorError
from segment_anything.modeling import Sam

from db.settings import settings
from workers.embeddings.address import EmbeddingError
from workers.embeddings.store import open_store
from workers.engine.device import default_device
from workers.engine.sam import promptable
from workers.errors import SourceError, redact
from workers.models.files import weights_sha256
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.models.spec import ModelError
from workers.models.tuned import require_tunable, write_decoder
from workers.params import AutomaticParams, automatic_params
from workers.tuning.checkpoint import load_run, save_run
from workers.tuning.gathering import FEWEST_JUDGING, Embeddings, Gathered, gather, hold_out, lesson_of
from workers.tuning.held_out import judge_held_out
from workers.tuning.lessons import Lesson
from workers.tuning.outcome import JUDGED_NAME, FewAssets, require_enough
from workers.tuning.plan import Plan, TuneError, read_plan
from workers.tuning.thresholds import Choice, choose_thresholds, images_to_try
from workers.tuning.training import Run, begin, train
from workers.tuning.views import copies

DECODER_NAME = "decoder.safetensors"
STOPPED = 130  # the exit code after Ctrl-C: a checkpoint is stored
_SAVE_SECONDS, _SAY_SECONDS = 60.0, 0.5

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The person or the command wants no more steps."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", required=True)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    cv2.setNumThreads(1)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which the command blocked while this was imported
        tune(asked.folder, seconds=asked.seconds, device=asked.device)
    except Stopped:
        return STOPPED
    except (ModelError, SourceError, EmbeddingError) as error:
        _say(error=redact(str(error)))
        return 2
    except torch.cuda.OutOfMemoryError:
        _say(error="out of GPU memory: free some, or use --device cpu")
        return 2
    except (OSError, SafetensorError) as error:  # the latter from save_file, also for a full disk
        _say(error=f"{asked.folder}: cannot be written or read ({redact(str(error))})")
        return 2
    return 0


def tune(folder: Path, *, seconds: float, device: str) -> None:
    """Gather, train, judge. Raises TuneError and other ModelErrors, Stopped."""
    plan = read_plan(folder)
    if plan is None:
        raise TuneError(f"{folder}: no plan.json")
    sam = _load(plan, default_device() if device == "auto" else device)
    base = promptable(sam, fold_from_dim=0)
    store = open_store(settings())
    embeddings = Embeddings(plan, base, folder / "embeddings", store)
    usable, left_out = _gather(plan, base, embeddings)
    teaching, judging = hold_out(usable)
    lessons = [lesson for lesson in map(lesson_of, teaching) if lesson.targets]
    _require_both_sides(lessons, judging)
    turned = copies(plan, base, embeddings, teaching, settings(), seconds=seconds, say=_say_at("copies"))
    run = begin(sam, plan.seed)
    if load_run(run, folder):
        log.warning("goes on from step %d", run.step)
    _train(run, [*lessons, *(copy for copy in turned if copy.targets)], embeddings, folder, seconds)
    write_decoder(run.kept(), folder / DECODER_NAME)
    choice, usual = _choose(plan, run, teaching, embeddings, seconds)
    automatic = (usual, replace(usual, **asdict(choice.chosen)))
    judgements, shown = judge_held_out(plan, run, judging, embeddings, automatic, say=_say_at("verdict"))
    document = {
        "defaults": choice.defaults,
        "thresholds": choice.as_json(),
        "steps": run.step,
        "seconds": run.seconds,
        "encoded": sum(one.encoded for one in usable),
        "taught": {"assets": len(lessons), "objects": sum(len(lesson.targets) for lesson in lessons),
                   "deleted": sum(len(lesson.wrong) for lesson in lessons), "copies": len(turned)},
        "left_out": left_out,
        "assets": [asdict(one) for one in judgements],
        "shown": [asdict(one) for one in shown],
    }  # fmt: skip
    _write(document, folder)


def _load(plan: Plan, device: str) -> Sam:
    """The model that is tuned, with finite weights. Raises ModelError."""
    spec = find_model(plan.model)
    require_tunable(spec)
    _require_device(device)
    if (found := weights_sha256(spec)) != plan.weights_sha256:
        raise TuneError(
            f"{spec.name} has the weights {found[:8]} here, the tuning began with {plan.weights_sha256[:8]}"
        )
    sam: Sam = load_model(spec, device).sam  # type: ignore[attr-defined]  # of the models that can be tuned
    broken = [name for name, value in sam.state_dict().items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise TuneError(
            f"{spec.name}: NaN or infinity in {len(broken)} tensors, such as {broken[0]}; nothing is trained"
        )
    return sam


def _require_device(device: str) -> None:
    """Raise TuneError for a device that is not here."""
    if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device) is None:
        raise TuneError(f"--device {device}: expected auto, cpu, cuda, or cuda: with a number")
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise TuneError(f"--device {device}: there is no CUDA device here; use --device cpu")
    if int(device.partition(":")[2] or 0) >= (count := torch.cuda.device_count()):
        raise TuneError(f"--device {device}: expected a number below {count}, as many CUDA devices are here")


def _require_both_sides(lessons: Sequence[Lesson], judging: Sequence[Gathered]) -> None:
    """Raise FewAssets without masks to learn from, or with too few images to judge by. Copies of one are one image."""
    if not lessons or len({one.content for one in judging if one.asset.masks}) < FEWEST_JUDGING:
        raise FewAssets(
            "too few masks to learn from and to judge by: at least four different images of the annotated ones need one"
        )


def _gather(plan: Plan, model: Any, embeddings: Embeddings) -> tuple[list[Gathered], list[dict[str, str]]]:
    usable: list[Gathered] = []
    left_out: list[dict[str, str]] = []
    for done, (asset, found) in enumerate(gather(plan, model, embeddings, settings()), start=1):
        if isinstance(found, str):
            left_out.append({"key": asset.key, "error": found})
        else:
            usable.append(found)
        _say(stage="images", done=done, of=len(plan.assets))
        _stop_if_asked()
    require_enough(len(usable), len(plan.assets), left_out)
    return usable, left_out


def _train(run: Run, lessons: Sequence[Any], embeddings: Embeddings, folder: Path, seconds: float) -> None:
    """Take the steps. Stores a checkpoint now and then, at the end, and when it is stopped."""
    saved, said = -_SAVE_SECONDS, time.monotonic()  # a disk without room is said after the first step
    try:
        steps = train(
            run,
            lessons,
            lambda lesson: embeddings.of(lesson.number, lesson.view),
            seconds=seconds,
            clock=time.monotonic,
        )
        for report in steps:
            now = time.monotonic()
            if now - said > _SAY_SECONDS:
                _say(stage="train", done=min(run.seconds, seconds), of=seconds, step=run.step, **asdict(report))
                said = now
            if now - saved > _SAVE_SECONDS:
                save_run(run, folder)
                saved = now
            _stop_if_asked()
    finally:
        save_run(run, folder)


def _choose(
    plan: Plan, run: Run, teaching: Sequence[Gathered], embeddings: Embeddings, seconds: float
) -> tuple[Choice, AutomaticParams]:
    """Choose the new decoder's thresholds. Also returns the parameters of automatic masks that the job had."""
    own = find_model(plan.model).defaults
    usual = automatic_params(own, plan.automatic)
    run.sam.mask_decoder.eval().requires_grad_(False)
    run.sam.mask_decoder.load_state_dict(run.kept())
    images = images_to_try(teaching, embeddings, seconds=seconds, say=_say_at("thresholds"))
    model = promptable(run.sam, fold_from_dim=0)
    return choose_thresholds(model, images, usual, automatic_params(own, {})), usual


def _write(document: Mapping[str, Any], folder: Path) -> None:
    part = folder / f".{JUDGED_NAME}.part"
    part.write_text(json.dumps(document), encoding="utf-8")
    part.replace(folder / JUDGED_NAME)


def _say_at(stage: str) -> Callable[[int, int], None]:
    def say(done: int, of: int) -> None:
        _say(stage=stage, done=done, of=of)
        _stop_if_asked()

    return say


_is_asked_to_stop = False


def _stop(*_: object) -> None:
    global _is_asked_to_stop
    _is_asked_to_stop = True


def _stop_if_asked() -> None:
    """Raise Stopped after a signal, and when stdin is closed: the command that started this process is gone."""
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], 0)
    if _is_asked_to_stop or (readable and os.read(sys.stdin.fileno(), 4096) == b""):
        raise Stopped


def _say(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
