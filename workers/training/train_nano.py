"""Trains sam_nano on drawn scenes: `python -m workers.training.train_nano --out DIR --seconds 4800`.

Most of the time it trains on crops. A crop costs less than a whole image and teaches the same, because it keeps its
place in the positional embeddings. The last part uses whole images. No photograph is ever read. The same seed draws the
same scenes in the same order. The number of steps in the given seconds depends on the machine.
"""

import argparse
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import torch
from safetensors.torch import save_file
from segment_anything.modeling import Sam
from segment_anything.modeling.transformer import Attention

from workers.models.nano import (
    EMBEDDING_SIZE,
    build_sam_nano,
    load_sam_nano,
)
from workers.training.nano_data import Batch, Prompts, draw_batch
from workers.training.nano_forward import decode, encode
from workers.training.nano_loss import compute_loss, jitter, sample_points, true_ious
from workers.training.nano_plan import BACKGROUND_CLICKS, Plan

log = logging.getLogger(__name__)

WARM_UP_STEPS = 80
# The last fit of the head. Its batches give about 30,000 samples. They take ten minutes to draw and one to learn.
CLICKS_AN_OBJECT, HEAD_EPOCHS, HEAD_BATCH, HEAD_RATE = 2, 15, 512, 1e-3
FIRST_HEAD_STEP = 10_000_000
LOG_SECONDS, SAVE_SECONDS = 20, 120


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that a checkpoint holds. average: the mean of the weights over the last steps; these weights ship."""

    model: Sam
    average: dict[str, torch.Tensor]
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0


def train(plan: Plan) -> None:
    """Train for plan.seconds, the time of an interrupted run included. Writes sam_nano.safetensors into plan.out."""
    plan.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    run = start_run(plan)
    started = time.perf_counter() - run.seconds
    saved = logged = time.perf_counter()
    sums: Counter[str] = Counter()
    while run.seconds < plan.seconds:
        batch = draw_batch(plan, run.step, run.seconds / plan.seconds)
        sums.update(take_step(run, batch, learning_rate(plan, run)))
        run.step += 1
        now = time.perf_counter()
        run.seconds = now - started
        if now - logged > LOG_SECONDS:
            means = "  ".join(f"{name} {value / sums['steps']:.3f}" for name, value in sums.items())
            log.info("step %d  %.0f s  %s", run.step, run.seconds, means)
            logged = now
            sums.clear()
        if now - saved > SAVE_SECONDS:
            save_run(run, plan.out)
            saved = now
    save_run(run, plan.out)
    if plan.head_batches:
        run.model.load_state_dict(run.average)
        save_weights(fit_iou_head(run.model, plan).state_dict(), plan.out)


def start_run(plan: Plan) -> Run:
    """The run whose checkpoint is in plan.out, or a new run, which starts from plan.start's weights if given."""
    model = (load_sam_nano("cpu", plan.start).train() if plan.start else init_weights(build_sam_nano())).to(plan.device)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    run = Run(model=model, average=average, optimizers=build_optimizers(model, plan.peak_rate))
    if (plan.out / "checkpoint.pt").exists():
        saved = torch.load(plan.out / "checkpoint.pt", weights_only=True, map_location=plan.device)
        run.model.load_state_dict(saved["model"])
        run.average = saved["average"]
        for optimizer, state in zip(run.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        run.step, run.seconds = saved["step"], saved["seconds"]
    return run


def save_run(run: Run, out: Path) -> None:
    """Write the averaged weights, and a checkpoint from which the training can continue."""
    save_weights(run.average, out)
    document = {
        "model": run.model.state_dict(),
        "average": run.average,
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "step": run.step,
        "seconds": run.seconds,
    }
    torch.save(document, out / "checkpoint.tmp")
    (out / "checkpoint.tmp").rename(out / "checkpoint.pt")


def save_weights(weights: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write weights in half precision, as in the shipped file."""
    half = {name: value.half().contiguous().cpu() for name, value in weights.items()}
    save_file(half, out / "sam_nano.safetensors")


def init_weights(model: Sam) -> Sam:
    """Start from sines of the position, small residual branches, and attention between similar tokens.

    With random queries and keys a token cannot distinguish places, and the first minutes of training are spent on that.
    With equal queries and keys (Trockman and Kolter, 2023, https://arxiv.org/abs/2305.09828) a token attends to near
    places from the first step.
    """
    encoder = model.image_encoder
    encoder.pos_embed.data.copy_(0.5 * sine_grid(EMBEDDING_SIZE, encoder.pos_embed.shape[-1]))
    for block in encoder.blocks:
        queries, keys, _ = block.attn.qkv.weight.data.chunk(3)
        keys.copy_(queries.mul_(1.5))
        block.attn.proj.weight.data.mul_(0.3)
        block.mlp.lin2.weight.data.mul_(0.3)
    for module in model.mask_decoder.transformer.modules():
        if isinstance(module, Attention):
            module.k_proj.weight.data.copy_(module.q_proj.weight.data.mul_(2))
    # segment_anything's random frequencies are about one wave in an image. Small objects need higher ones. They are
    # rounded, because the shipped file is in half precision.
    matrix = model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    matrix.copy_((matrix * 2.5).half().float())
    return model


def sine_grid(size: int, channels: int) -> torch.Tensor:
    """(1, size, size, channels): the first half of the channels follows x, the second y."""
    waves = torch.exp(torch.linspace(math.log(math.pi / size / 2), math.log(math.pi / 2), channels // 4))
    turns = torch.arange(size)[:, None] * waves[None]
    line = torch.cat([turns.sin(), turns.cos()], dim=1)
    return torch.cat([line[None].expand(size, -1, -1), line[:, None].expand(-1, size, -1)], dim=2)[None]


def build_optimizers(model: Sam, peak_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformers, AdamW for all other weights.

    In the first 250 steps of this model Muon was better than AdamW at an equal rate (IoU of a click 0.24 against 0.18,
    2026-11-20).
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and ("blocks" in name or "transformer" in name)
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.AdamW(others, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.02),
        torch.optim.Muon(matrices, lr=peak_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
    ]


def learning_rate(plan: Plan, run: Run) -> float:
    """A warm-up, then a cosine over the run's time down to a hundredth of the peak."""
    done = min(run.seconds / plan.seconds, 1.0)
    warmth = min(1.0, (run.step + 1) / WARM_UP_STEPS)
    return plan.peak_rate * warmth * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def take_step(run: Run, batch: Batch, rate: float) -> dict[str, float]:
    """One update of the weights and their average. Returns the mean IoUs, which show the training's progress."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
    loss, report = compute_loss(run.model, batch)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
    # The average changes quickly at first. Later it covers about 150 steps.
    share = max(0.007, 9 / (run.step + 10))
    with torch.no_grad():
        for name, value in run.model.state_dict().items():
            run.average[name].lerp_(value, share)
    return {"steps": 1, "loss": float(loss.detach()), **report}


def fit_iou_head(model: Sam, plan: Plan) -> Sam:
    """Train the head that predicts IoUs once more, alone. The masks stay the same, so their IoUs stay the same.

    When it is trained with the rest, the masks and their IoUs change all the time. Alone its correlation with the true
    IoU rose from 0.61 to 0.68 (held-out scenes, 2026-11-21).
    """
    tokens, true, weights = (torch.cat(parts) for parts in zip(*draw_iou_samples(model, plan), strict=True))
    head = model.mask_decoder.iou_prediction_head
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_RATE, weight_decay=0.05)
    size = min(HEAD_BATCH, len(tokens))
    steps = HEAD_EPOCHS * (len(tokens) // size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    for _ in range(HEAD_EPOCHS):
        for rows in torch.randperm(len(tokens))[: len(tokens) // size * size].reshape(-1, size):
            error = (head(tokens[rows]) - true[rows]).square() * weights[rows]
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(error.sum() / weights[rows].sum())
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def draw_iou_samples(model: Sam, plan: Plan) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Clicks and boxes on scenes that training did not use: the head's input (n, C), the true IoUs and their weights.

    IoUs and weights are (n, 4). A box only asks for the first mask. A click on the background has no right mask.
    """
    tokens: list[torch.Tensor] = []
    hook = model.mask_decoder.iou_prediction_head.register_forward_pre_hook(lambda _, given: tokens.append(given[0]))
    for number in range(plan.head_batches):
        batch = draw_batch(plan, FIRST_HEAD_STEP + number, 1 - 1e-6)
        embeddings = encode(model, batch)
        ground = batch.background[:, None].expand(-1, BACKGROUND_CLICKS, -1, -1)
        points = torch.cat([sample_points(batch.targets) for _ in range(CLICKS_AN_OBJECT)], dim=1)
        points = torch.cat([points, sample_points(ground)], dim=1)[:, :, None]
        clicks = Prompts(points=points, labels=torch.ones_like(points[..., 0]))
        logits, _ = decode(model, batch, embeddings, clicks)
        true = true_ious(logits, torch.cat([batch.targets] * CLICKS_AN_OBJECT + [torch.zeros_like(ground)], dim=1))
        weights = torch.ones_like(true)
        weights[:, -BACKGROUND_CLICKS:] = 0.3
        yield tokens.pop().float(), true.flatten(0, 1), weights.flatten(0, 1)
        logits, _ = decode(model, batch, embeddings, Prompts(boxes=jitter(batch.boxes_xyxy)))
        true = true_ious(logits, batch.targets)
        weights = torch.zeros_like(true)
        weights[..., 0] = 1
        yield tokens.pop().float(), true.flatten(0, 1), weights.flatten(0, 1)
    hook.remove()


def _parse_plan() -> Plan:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights and of the checkpoint")
    parser.add_argument("--seconds", type=float, default=4800, help="how long to train in total")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-rate", type=float, default=1.5e-3)
    parser.add_argument("--head-batches", type=int, default=250, help="for the IoU head's last fit; 0 skips it")
    parser.add_argument("--start", type=Path, help="weights to start from, instead of random ones")
    return Plan(**vars(parser.parse_args()))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    train(_parse_plan())
