"""Trains sam_nano on scenes drawn on the fly: `python -m workers.training.train_nano --out DIR --seconds 4800`.

Most of the time goes to crops of the image, which cost a part of it and, keeping their place in the positional
embeddings, teach the same thing; the last part is whole images. No photograph is ever read.
The same seed draws the same scenes in the same order; how many steps fit into the seconds depends on the machine.
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
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from segment_anything.modeling import Sam
from segment_anything.modeling.transformer import Attention

from workers.models.nano import (
    EMBEDDING_SIZE,
    IMAGE_SIZE_PX,
    PATCH_SIZE_PX,
    PIXEL_MEAN,
    PIXEL_STD,
    build_sam_nano,
    load_sam_nano,
)
from workers.training.scenes import Scene, draw_scene

log = logging.getLogger(__name__)

MASK_CELL_PX = PATCH_SIZE_PX // 4
# (part of the time after which it ends, side of the crop in cells of the embedding, images a batch). Small batches at
# first, where many steps matter more than quiet ones; whole images last, for objects larger than a crop.
STAGES = ((0.2, 16, 8), (0.4, 16, 12), (0.6, 24, 8), (1.0, EMBEDDING_SIZE, 6))
OBJECT_CLICKS = 5
BACKGROUND_CLICKS = 2
CORRECTIONS = 3  # objects an image whose click is corrected; all get a box
BOX_WEIGHT, IOU_WEIGHT = 3.0, 4.0
WARM_UP_STEPS = 80
# The last fit of the head: its batches give some 30,000 samples, which take ten minutes to draw and one to learn.
CLICKS_AN_OBJECT, HEAD_EPOCHS, HEAD_BATCH, HEAD_RATE = 2, 15, 512, 1e-3
FIRST_HEAD_STEP = 10_000_000
LOG_SECONDS, SAVE_SECONDS = 20, 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run was asked."""

    out: Path
    seconds: float
    seed: int
    device: str
    peak_rate: float
    start: Path | None = None
    head_batches: int = 250


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that a checkpoint holds. average: of the weights over the last steps, that which ships."""

    model: Sam
    average: dict[str, torch.Tensor]
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B images and K objects of each, in the frame of the crop, S pixels a side.

    images: (B, 3, S, S) float32, normalised. targets: (B, K, S/2, S/2) float32, the share 0..1 of a mask cell that
    the object covers. boxes_xyxy: (B, K, 4) float32. background: (B, S/2, S/2) float32, as targets.
    offset_xy: of the crop in the embedding's grid.
    """

    images: torch.Tensor
    targets: torch.Tensor
    boxes_xyxy: torch.Tensor
    background: torch.Tensor
    offset_xy: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """P prompts on each of B images: points (B, P, N, 2) xy, labels (B, P, N), boxes (B, P, 4), logits (B, P, h, w)."""

    points: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    previous: torch.Tensor | None = None


def train(plan: Plan) -> None:
    """Train for plan.seconds, those of an interrupted run in plan.out counted; sam_nano.safetensors lies there then."""
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
    """A new run, from plan.start's weights where it names some, or the one whose checkpoint lies in plan.out."""
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
    """Write the averaged weights, and a checkpoint to go on from."""
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
    """Write weights in half precision, as they ship."""
    half = {name: value.half().contiguous().cpu() for name, value in weights.items()}
    save_file(half, out / "sam_nano.safetensors")


def init_weights(model: Sam) -> Sam:
    """Start from sines of the position, small residual branches, and attention between what is alike.

    With random queries and keys a token cannot tell places apart, and training spends its first minutes on that.
    Equal ones (Trockman and Kolter, 2023, https://arxiv.org/abs/2305.09828) look near the point from the first step.
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
    # segment_anything draws frequencies of about one wave an image; small objects need finer ones. Rounded, since
    # the shipped file is in half precision.
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
    """Muon for the matrices inside the transformers, AdamW for all else.

    In the first 250 steps of this model Muon was ahead of AdamW at an equal rate (IoU of a click 0.24 against 0.18,
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
    """Warm up, then a cosine over the run's time, down to a hundredth of the peak."""
    done = min(run.seconds / plan.seconds, 1.0)
    warmth = min(1.0, (run.step + 1) / WARM_UP_STEPS)
    return plan.peak_rate * warmth * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def draw_batch(plan: Plan, step: int, done: float) -> Batch:
    """The batch of a step, from scenes that no other step has; done: the part 0..1 of the time that is over."""
    rng = np.random.default_rng((plan.seed, step))
    cells, count = next((cells, count) for end, cells, count in STAGES if done < end)
    samples = [draw_sample(rng, cells * PATCH_SIZE_PX) for _ in range(count)]
    images, targets, boxes, background = (torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))
    # In multiples of the attention windows, so that a crop is cut into the windows of the whole.
    room = (EMBEDDING_SIZE - cells) // 8 + 1
    return Batch(
        images=images.to(plan.device),
        targets=targets.to(plan.device),
        boxes_xyxy=boxes.to(plan.device),
        background=background.to(plan.device),
        offset_xy=(8 * int(rng.integers(room)), 8 * int(rng.integers(room))),
    )


def draw_sample(rng: np.random.Generator, side_px: int) -> tuple[npt.NDArray[np.float32], ...]:
    """One scene as (image, targets, boxes, background) of a Batch, padded as Sam.preprocess pads."""
    scene = _draw_padded_scene(rng, side_px)
    image = np.zeros((3, side_px, side_px), np.float32)
    h, w = scene.owner.shape
    normalised = (scene.image - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)
    image[:, :h, :w] = normalised.transpose(2, 0, 1)
    owner = np.pad(scene.owner, ((0, side_px - h), (0, side_px - w)))
    chosen = np.resize(rng.permutation(scene.object_count)[:OBJECT_CLICKS], OBJECT_CLICKS) + 1
    masks = [(owner == index).astype(np.uint8) for index in chosen]
    x_y_w_h = np.array([cv2.boundingRect(mask) for mask in masks], np.float32)
    boxes = np.concatenate([x_y_w_h[:, :2], x_y_w_h[:, :2] + x_y_w_h[:, 2:]], axis=1)
    return image, np.stack([_cover(mask) for mask in masks]), boxes, _cover((owner == 0).astype(np.uint8))


def _draw_padded_scene(rng: np.random.Generator, side_px: int) -> Scene:
    """A scene with objects in it, as large as the frame or shorter on one side."""
    is_whole = side_px == IMAGE_SIZE_PX
    while True:
        size = [side_px, side_px]
        if rng.random() < (0.6 if is_whole else 0.25):
            size[rng.integers(2)] = int(side_px * rng.uniform(0.5, 1.0))
        unit = IMAGE_SIZE_PX * rng.uniform(0.85 if is_whole else 0.6, 1.15)
        scene = draw_scene(int(rng.integers(1 << 40)), (size[0], size[1]), unit_px=unit)
        if scene.object_count:
            return scene


def _cover(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The share of each mask cell that a mask (S, S) of 0 and 1 covers, (S/2, S/2) float32."""
    cells = (mask.shape[1] // MASK_CELL_PX, mask.shape[0] // MASK_CELL_PX)
    return np.asarray(cv2.resize(mask.astype(np.float32), cells, interpolation=cv2.INTER_AREA), np.float32)


def take_step(run: Run, batch: Batch, rate: float) -> dict[str, float]:
    """One update of weights and average; gives the mean IoUs that tell how training goes."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
    loss, report = compute_loss(run.model, batch)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
    # The average moves quickly at first, over some 150 steps later.
    share = max(0.007, 9 / (run.step + 10))
    with torch.no_grad():
        for name, value in run.model.state_dict().items():
            run.average[name].lerp_(value, share)
    return {"steps": 1, "loss": float(loss.detach()), **report}


def compute_loss(model: Sam, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Clicks, then boxes, then corrections of the clicks' own masks."""
    embeddings = encode(model, batch)
    clicks, points, logits, ious, report = click_loss(model, batch, embeddings)
    # A third of the boxes are drawn by a loose hand, a sixth come with a click.
    points_of_boxes = sample_points(batch.targets)[:, :, None] if torch.rand(()) < 1 / 6 else None
    labels_of_boxes = None if points_of_boxes is None else torch.ones_like(points_of_boxes[..., 0])
    prompts = Prompts(points=points_of_boxes, labels=labels_of_boxes, boxes=jitter(batch.boxes_xyxy))
    boxed, report["box"] = single_mask_loss(model, batch, embeddings, prompts)
    # Corrections go to the mask that the model itself would show.
    shown = ious[..., 1:].argmax(-1)[:, :CORRECTIONS, None, None, None].expand(-1, -1, 1, *logits.shape[-2:])
    targets = batch.targets[:, :CORRECTIONS]
    first = logits[:, :CORRECTIONS, 1:].gather(2, shown)[:, :, 0].detach().float()
    more, labels = sample_corrections(first, targets, count=int(torch.randint(1, 4, ())))
    prompts = Prompts(
        points=torch.cat([points[:, :CORRECTIONS, None], more], dim=2),
        labels=torch.cat([torch.ones_like(labels[..., :1]), labels], dim=2),
        previous=first if torch.rand(()) < 0.4 else None,
    )
    corrected, report["corrected"] = single_mask_loss(model, batch, embeddings, prompts)
    return clicks + BOX_WEIGHT * boxed + corrected, report


def click_loss(
    model: Sam, batch: Batch, embeddings: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, float]]:
    """One click on each object and some on the background, where no mask is right and only the IoU is taught.

    Gives the loss, the points (B, P, 2), logits (B, P, 4, h, w), predicted IoU (B, P, 4), and the report.
    """
    k = batch.targets.shape[1]
    ground = batch.background[:, None].expand(-1, BACKGROUND_CLICKS, -1, -1)
    points = sample_points(torch.cat([batch.targets, ground], dim=1))
    prompts = Prompts(points=points[:, :, None], labels=torch.ones_like(points[..., :1]))
    logits, ious = decode(model, batch, embeddings, prompts)
    true = true_ious(logits, torch.cat([batch.targets, torch.zeros_like(ground)], dim=1))
    # The best of the three learns most; the others follow a little, so that none is left to rot.
    losses = mask_losses(logits[:, :k], batch.targets)
    three = losses[..., 1:]
    shapes = three.amin(-1).mean() + 0.15 * three.mean() + 0.5 * losses[..., 0].mean()
    loss = shapes + IOU_WEIGHT * F.mse_loss(ious, true)
    guess = ious.detach()
    shown = guess[:, :k, 1:].argmax(-1, keepdim=True)
    report = {
        "click": float(true[:, :k, 1:].amax(-1).mean()),
        "shown": float(true[:, :k, 1:].gather(2, shown).mean()),
        "iou_error": float((guess - true).abs().mean()),
        "ground": float(guess[:, k:, 1:].amax(-1).mean()),
    }
    return loss, points, logits, guess, report


def single_mask_loss(
    model: Sam, batch: Batch, embeddings: torch.Tensor, prompts: Prompts
) -> tuple[torch.Tensor, float]:
    """Prompts that leave no doubt go to the first mask token; gives the loss and the mean IoU."""
    logits, ious = decode(model, batch, embeddings, prompts)
    targets = batch.targets[:, : logits.shape[1]]
    true = true_ious(logits[:, :, :1], targets)
    loss = mask_losses(logits[:, :, :1], targets).mean() + IOU_WEIGHT * F.mse_loss(ious[..., :1], true)
    return loss, float(true.mean())


def fit_iou_head(model: Sam, plan: Plan) -> Sam:
    """Train the head that predicts IoUs once more, alone: the masks stay as they are, so their IoUs hold still.

    Together with the rest it chases masks that get better all the while; alone its correlation with the true IoU rose
    from 0.61 to 0.68 (held-out scenes, 2026-11-21).
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
    """Clicks and boxes on scenes that training did not draw: the head's input (n, C), the true IoUs (n, 4) and how much
    each of these weighs (n, 4); a box asks for the first mask alone, a click on the background has no right mask."""
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


def encode(model: Sam, batch: Batch) -> torch.Tensor:
    """ImageEncoderViT.forward for a crop that keeps its place in the positional embedding: (B, C, h, w)."""
    encoder = model.image_encoder
    x0, y0 = batch.offset_xy
    with _autocast(batch.images):
        x = encoder.patch_embed(batch.images)
        x = x + encoder.pos_embed[:, y0 : y0 + x.shape[1], x0 : x0 + x.shape[2]]
        for block in encoder.blocks:
            x = block(x)
        return torch.as_tensor(encoder.neck(x.permute(0, 3, 1, 2)))


def decode(model: Sam, batch: Batch, embeddings: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """MaskDecoder.predict_masks for P prompts on each of B images at once.

    Gives logits (B, P, 4, h, w), the single mask first and then the three, and predicted IoU (B, P, 4) float32.
    """
    decoder, prompt_encoder = model.mask_decoder, model.prompt_encoder
    b, c, h, w = embeddings.shape
    x0, y0 = batch.offset_xy
    sparse = embed_prompts(model, batch, prompts)
    n = sparse.shape[0] // b
    place = prompt_encoder.get_dense_pe()[:, :, y0 : y0 + h, x0 : x0 + w].expand(b * n, -1, -1, -1)
    with _autocast(embeddings):
        dense = prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        if prompts.previous is not None:
            dense = prompt_encoder.mask_downscaling(prompts.previous.flatten(0, 1)[:, None])
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(b * n, -1, -1)
        source = embeddings.repeat_interleave(n, dim=0) + dense
        hidden, source = decoder.transformer(source, place, torch.cat([tokens, sparse], dim=1))
        upscaled = decoder.output_upscaling(source.transpose(1, 2).reshape(b * n, c, h, w))
        mlps = decoder.output_hypernetworks_mlps
        weights = torch.stack([mlp(hidden[:, 1 + i]) for i, mlp in enumerate(mlps)], dim=1)
        logits = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    ious = decoder.iou_prediction_head(hidden[:, 0].float())
    return logits.unflatten(0, (b, n)), ious.unflatten(0, (b, n))


def embed_prompts(model: Sam, batch: Batch, prompts: Prompts) -> torch.Tensor:
    """The tokens (B * P, N, C) of points and boxes, moved from the crop's frame to the image's; in float32."""
    shift = torch.tensor(batch.offset_xy, device=batch.images.device) * PATCH_SIZE_PX
    points = None
    if prompts.points is not None and prompts.labels is not None:
        points = ((prompts.points + shift).flatten(0, 1), prompts.labels.flatten(0, 1))
    boxes = None if prompts.boxes is None else (prompts.boxes + shift.repeat(2)).flatten(0, 1)
    sparse, _ = model.prompt_encoder(points=points, boxes=boxes, masks=None)
    return torch.as_tensor(sparse)


def _autocast(like: torch.Tensor) -> torch.autocast:
    # Half the time on a CPU with avx512_bf16 (measured 2026-11-20); positions and losses stay in float32.
    return torch.autocast(like.device.type, torch.bfloat16)


def mask_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy plus dice against covered shares: logits (B, P, M, h, w), targets (B, P, h, w) give (B, P, M)."""
    logits = logits.float()
    targets = targets[:, :, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((-2, -1))
    chance = logits.sigmoid()
    overlap = (chance * targets).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (chance.square().sum((-2, -1)) + targets.square().sum((-2, -1)) + 1)
    return 2 * entropy + dice


@torch.no_grad()
def true_ious(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of the thresholded masks on the mask grid, (B, P, M) float32; 0 for an empty target."""
    masks, wanted = logits > 0, targets[:, :, None] > 0.5
    both = (masks & wanted).sum((-2, -1)).float()
    return both / (masks | wanted).sum((-2, -1)).clamp(min=1).float()


@torch.no_grad()
def sample_points(weights: torch.Tensor) -> torch.Tensor:
    """A random point of each map (B, P, h, w), of its cells above a half where it has any: (B, P, 2) xy pixels."""
    chance = torch.rand_like(weights) * (weights + 10 * (weights > 0.5))
    flat = chance.flatten(2).argmax(-1)
    cell = torch.stack([flat % weights.shape[-1], flat // weights.shape[-1]], dim=-1).float()
    return (cell + torch.rand_like(cell)) * MASK_CELL_PX - 0.5


@torch.no_grad()
def sample_corrections(logits: torch.Tensor, targets: torch.Tensor, *, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clicks on the errors of logits (B, P, h, w): points (B, P, count, 2) xy and labels (B, P, count), 1 inside."""
    inside = targets > 0.5
    # Where nothing is wrong, the object gets another click.
    wrong = ((logits > 0) != inside).float() + 1e-3 * inside
    points = torch.stack([sample_points(wrong) for _ in range(count)], dim=2)
    x, y = ((points + 0.5) / MASK_CELL_PX).long().clamp(0, targets.shape[-1] - 1).unbind(-1)
    return points, inside.flatten(2).gather(2, y * targets.shape[-1] + x).float()


@torch.no_grad()
def jitter(boxes_xyxy: torch.Tensor) -> torch.Tensor:
    """The boxes (B, P, 4), the corners of a third of them off by about 5 % of the sides."""
    sides = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).repeat(1, 1, 2)
    is_loose = torch.rand_like(boxes_xyxy[..., :1]) < 1 / 3
    return boxes_xyxy + is_loose * 0.05 * sides * torch.randn_like(boxes_xyxy)


def _parse_plan() -> Plan:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights and of the checkpoint")
    parser.add_argument("--seconds", type=float, default=4800, help="how long to train, in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-rate", type=float, default=1.5e-3)
    parser.add_argument("--head-batches", type=int, default=250, help="for the IoU head's last fit; 0 leaves it out")
    parser.add_argument("--start", type=Path, help="weights to go on from, instead of random ones")
    return Plan(**vars(parser.parse_args()))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    train(_parse_plan())
