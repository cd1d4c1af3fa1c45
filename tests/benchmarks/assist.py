"""Measures clicks: CPU time of a click, what rounding an embedding costs, a child's memory, a job that keeps.

    python tests/benchmarks/assist.py [--json] [--section click|rounding|memory|keep]

Each section runs in a process of its own. Times are CPU milliseconds of one thread, the best and the median of several
turns. The reference is label-studio-ml-backend's way in the same process: SamPredictor encodes the image at each click,
with the same weights. vit_b has random weights, written as a checkpoint on the spot: no mask means anything there, but
every operation is done. Its upscaling has the same weights for neighbouring pixels. Otherwise its masks would have a
hundred thousand runs, which no object has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.build_sam import build_sam_vit_b
from segment_anything.modeling import Sam
from sqlalchemy import Engine, text

from db import jobs, listing
from db.listing import NewAsset
from db.migrating import migrate
from db.session import open_engine
from db.settings import Settings, settings
from orchestrator.local.postgres import EmbeddedPostgres
from tests.pixels import decode_counts
from workers.clicks.child import keep_freed_memory
from workers.clicks.decoding import Decoding
from workers.clicks.messages import ClickAnswer, ClickRequest, read_answer, to_line
from workers.embeddings.address import EmbeddingFormat, EmbeddingOf
from workers.embeddings.codec import encode
from workers.embeddings.store import EmbeddingStore
from workers.models.files import model_version, weights_path
from workers.models.loading import load_model
from workers.models.registry import MODELS, find_model
from workers.params import PromptParams
from workers.prompts import Prompt
from workers.running.chunk import run_chunk
from workers.running.worker import Worker
from workers.storage.objects import open_objects
from workers.storage.source import open_source
from workers.training.scenes import Scene, draw_scene

FIRST_SEED = 8_000_000_000_000  # training draws below 2 ** 40
FULL_HD = (1080, 1920)
SCENE_HW = (480, 640)
TURNS = 12
MEMORY_IMAGES = 24
JOB_IMAGES = 12
JOB_PAIRS = 5
FP16, INT8 = EmbeddingFormat.FP16, EmbeddingFormat.INT8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. bar: the limit it must hold, None if it is only shown."""

    name: str
    value: float
    bar: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool:
        if self.bar is None:
            return True
        return self.value <= self.bar if self.at_most else self.value >= self.bar


# Clicks


def measure_clicks() -> Iterator[Row]:
    with synthetic_vit_b() as folder:
        store = EmbeddingStore(open_objects(str(folder / "kept")))
        yield from clicks_of("sam_vit_b", store, FULL_HD, first=100, following=60)
        yield from against_the_encoder("sam_vit_b", store)
    with tempfile.TemporaryDirectory() as kept:
        yield from clicks_of("sam_nano", EmbeddingStore(open_objects(kept)), FULL_HD, first=25, following=25)


def clicks_of(
    name: str, store: EmbeddingStore, size_hw: tuple[int, int], *, first: float, following: float
) -> Iterator[Row]:
    """CPU time of the first click on an image and of the next ones, through the child's own code."""
    images = [keep_noise(store, name, n) for n in range(TURNS)]
    decoding = Decoding(store)
    decoding.answer(click(images[0], size_hw))  # loads the model
    decoding = with_models_of(decoding, store)
    firsts = [cpu_ms(lambda of=of: answered(decoding, of, size_hw)) for of in images]  # type: ignore[misc]
    points = [cpu_ms(lambda: answered(decoding, images[-1], size_hw)) for _ in range(TURNS)]
    boxes = [cpu_ms(lambda: answered(decoding, images[-1], size_hw, box=True)) for _ in range(TURNS)]
    where = f"at {size_hw[1]}x{size_hw[0]}, CPU ms"
    yield Row(name=f"{name}: the first click on an image {where}, best", value=min(firsts))
    yield Row(name=f"{name}: the same, median", value=statistics.median(firsts), bar=first, at_most=True)
    yield Row(name=f"{name}: the next clicks, a point {where}, best", value=min(points))
    yield Row(name=f"{name}: the same, median", value=statistics.median(points), bar=following, at_most=True)
    yield Row(
        name=f"{name}: the next clicks, a box, median", value=statistics.median(boxes), bar=following, at_most=True
    )


def against_the_encoder(name: str, store: EmbeddingStore) -> Iterator[Row]:
    """The same click where the image is encoded at each click."""
    predictor = SamPredictor(build_vit_b())
    image = draw_scene(FIRST_SEED, FULL_HD).image
    of = keep_noise(store, name, 0)
    decoding = Decoding(store)
    answered(decoding, of, FULL_HD)

    def encode_and_click() -> None:
        predictor.set_image(image)
        predictor.predict(np.array([[960.0, 540.0]]), np.array([1]), multimask_output=True)

    reference = cpu_ms(encode_and_click)
    ours = statistics.median(cpu_ms(lambda: answered(decoding, of, FULL_HD)) for _ in range(TURNS))
    yield Row(name=f"{name}: encoder and decoder at each click, CPU ms", value=reference)
    yield Row(name=f"{name}: a next click, part of that", value=ours / reference, bar=1 / 20, at_most=True)


def with_models_of(decoding: Decoding, store: EmbeddingStore) -> Decoding:
    """A decoding with loaded models and no kept image."""
    fresh = Decoding(store)
    fresh._models = decoding._models
    return fresh


def answered(decoding: Decoding, of: EmbeddingOf, size_hw: tuple[int, int], *, box: bool = False) -> None:
    answer = decoding.answer(click(of, size_hw, box=box))
    assert answer.mask is not None, answer


def click(of: EmbeddingOf, size_hw: tuple[int, int], *, box: bool = False) -> ClickRequest:
    height, width = size_hw
    prompt = Prompt(points=((width / 2, height / 2, 1),))
    if box:
        prompt = Prompt(box_xyxy=(width / 4, height / 4, width / 2, height / 2))
    return ClickRequest(n=1, stamp=of.stamp, size_hw=size_hw, prompt=prompt)


def keep_noise(store: EmbeddingStore, name: str, n: int, kind: EmbeddingFormat = FP16) -> EmbeddingOf:
    """A kept embedding of smooth noise in the model's shape."""
    channels, grid = (128, 32) if name == "sam_nano" else (256, 64)
    coarse = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(n))
    of = embedding_of(name, f"{n}", kind)
    smooth = torch.nn.functional.interpolate(coarse, size=(grid, grid), mode="bicubic")
    store.write(of.address, encode(smooth, of))
    return of


def embedding_of(name: str, key: str, kind: EmbeddingFormat) -> EmbeddingOf:
    sha256 = find_model(name).sha256
    return EmbeddingOf(model=name, weights_sha256=sha256, fast=False, format=kind, source="bench", key=key, etag="e")


def build_vit_b() -> Sam:
    """vit_b with random weights, always the same."""
    torch.manual_seed(0)
    sam: Sam = build_sam_vit_b().eval().requires_grad_(False)
    for layer in sam.mask_decoder.output_upscaling:
        if isinstance(layer, torch.nn.ConvTranspose2d):
            layer.weight.copy_(layer.weight.mean((2, 3), keepdim=True).expand_as(layer.weight))
    return sam


@contextmanager
def synthetic_vit_b() -> Iterator[Path]:
    """A folder with a checkpoint of vit_b with random weights, which the registry of this process takes for its own.

    A `sitecustomize.py` beside it makes a child's registry take it too.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        os.environ["MASKFLEET_WEIGHTS_DIR"] = made
        settings.cache_clear()
        path = weights_path(find_model("sam_vit_b"))
        torch.save(build_vit_b().state_dict(), path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        MODELS["sam_vit_b"] = replace(MODELS["sam_vit_b"], sha256=sha256, size_bytes=size)
        (folder / "sitecustomize.py").write_text(
            "from dataclasses import replace\nfrom workers.models.registry import MODELS\n"
            f"MODELS['sam_vit_b'] = replace(MODELS['sam_vit_b'], sha256={sha256!r}, size_bytes={size})\n"
        )
        yield folder


# Rounding


def measure_rounding() -> Iterator[Row]:
    """IoU of masks from a rounded embedding with those from the model's own, sam_nano on drawn scenes."""
    model, ious = load_model(find_model("sam_nano"), "cpu"), {FP16: [1.0] * 0, INT8: [1.0] * 0}
    with tempfile.TemporaryDirectory() as kept:
        store = EmbeddingStore(open_objects(kept))
        decoding = Decoding(store)
        for number in range(8):
            scene = draw_scene(FIRST_SEED + number, SCENE_HW)
            [embedding] = model.embed([scene.image])
            prompts = list(prompts_on(scene))
            expected = model.prompted(scene.image, embedding, prompts, PromptParams())
            for kind, found in ious.items():
                of = embedding_of("sam_nano", f"{number}", kind)
                store.write(of.address, encode(embedding, of))
                for prompt, [mask] in zip(prompts, expected, strict=True):
                    request = ClickRequest(n=1, stamp=of.stamp, size_hw=SCENE_HW, prompt=prompt)
                    answer = decoding.answer(request)
                    assert answer.mask is not None, answer
                    one, other = (decode_counts(m.counts, SCENE_HW) for m in (answer.mask, mask))
                    found.append(iou(one, other))
    for kind, mean, least in ((FP16, 0.999, 0.99), (INT8, 0.995, None)):
        yield Row(name=f"{kind}: mean IoU of {len(ious[kind])} masks", value=float(np.mean(ious[kind])), bar=mean)
        yield Row(name=f"{kind}: least IoU", value=min(ious[kind]), bar=least)


def prompts_on(scene: Scene) -> Iterator[Prompt]:
    """A point inside each object, and its box."""
    for mask in scene.masks:
        depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
        y, x = divmod(int(depth.argmax()), mask.shape[1])
        yield Prompt(points=((float(x), float(y), 1),))
        left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
        yield Prompt(box_xyxy=(float(left), float(top), float(left + width), float(top + height)))


def iou(one: Any, other: Any) -> float:
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


# Memory


def measure_memory() -> Iterator[Row]:
    """The peak memory of a real child that answers clicks with vit_b's decoder on more images than it keeps."""
    with synthetic_vit_b() as folder:
        store = EmbeddingStore(open_objects(str(folder / "kept")))
        images = [keep_noise(store, "sam_vit_b", n) for n in range(MEMORY_IMAGES)]
        environment = os.environ | {"PYTHONPATH": str(folder), "MASKFLEET_EMBEDDINGS": str(folder / "kept")}
        command = [sys.executable, "-P", "-m", "workers.clicks.child"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdout.readline()
            idle = memory_mb(child.pid)
            most = idle
            for of in images:
                for box in (False, True):
                    child.stdin.write(to_line(click(of, FULL_HD, box=box)))
                    child.stdin.flush()
                    answer = read_answer(child.stdout.readline())
                    assert isinstance(answer, ClickAnswer)
                    assert answer.mask is not None, answer
                    used = memory_mb(child.pid)
                    most = {name: max(most[name], used[name]) for name in used}
            child.stdin.close()
    yield Row(name="a child that has only imported torch and the rest, its own memory, MB", value=idle["RssAnon"])
    yield Row(name="the same with the pages of libraries that all processes share, MB", value=idle["VmRSS"])
    what = f"a child in clicks on {MEMORY_IMAGES} images of vit_b, its own memory, most MB"
    yield Row(name=what, value=most["RssAnon"], bar=600, at_most=True)
    yield Row(name="the same with the pages that all processes share, most MB", value=most["VmRSS"])


def memory_mb(pid: int) -> dict[str, float]:
    """RssAnon: what this process alone holds. VmRSS: with the pages of libraries, which processes share."""
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return {words[0][:-1]: int(words[1]) / 1000 for words in lines if words[0] in ("RssAnon:", "VmRSS:")}


# A job that keeps


def measure_keeping() -> Iterator[Row]:
    """Assets a second of a worker's chunk with and without --keep-embeddings all, in pairs that take turns."""
    with tempfile.TemporaryDirectory() as made, EmbeddedPostgres(Path(made) / "postgres") as postgres:
        migrate(postgres.url)
        engine = open_engine(postgres.url)
        folder = Path(made) / "images"
        folder.mkdir()
        for n in range(JOB_IMAGES):
            Image.fromarray(draw_scene(FIRST_SEED + n, SCENE_HW).image).save(folder / f"{n}.jpg")
        worker = make_worker(engine, Path(made) / "kept")
        run_chunk(worker, make_chunk(engine, folder, keep=False))
        wall: list[float] = []
        cpu: list[float] = []
        for pair in range(JOB_PAIRS):
            taken = {}
            for keep in (True, False) if pair % 2 else (False, True):
                taken[keep] = timed_chunk(worker, make_chunk(engine, folder, keep=keep))
                with engine.begin() as db:
                    kept = db.execute(text("DELETE FROM embedding RETURNING state")).scalars().all()
                assert kept == ["stored"] * (JOB_IMAGES if keep else 0)
            wall.append(taken[False][0] / taken[True][0])
            cpu.append(taken[False][1] / taken[True][1])
        engine.dispose()
    what = f"{JOB_PAIRS} pairs of {JOB_IMAGES} images"
    name = f"rate with --keep-embeddings all against without, {what}, wall, median"
    yield Row(name=name, value=statistics.median(wall), bar=0.95)
    yield Row(name="the same by CPU time, median", value=statistics.median(cpu))


def make_chunk(engine: Engine, folder: Path, *, keep: bool) -> int:
    asked: dict[str, Any] = {"params": {}} | ({"keep_embeddings": "all"} if keep else {})
    [page] = open_source(str(folder)).list()
    with engine.begin() as db:
        job = jobs.insert_job(
            db,
            name="bench",
            source=str(folder),
            model="sam_nano",
            model_version=model_version(find_model("sam_nano"), {}),
            asked=asked,
            fresh=True,
        )
        assets = [NewAsset(key=one.key, size_bytes=one.size_bytes, etag=one.etag) for one in page.objects]
        listing.add_assets(db, job=job, assets=assets, cursor=page.cursor, skipped={}, complete=True, chunk_size=64)
        return int(db.execute(text("SELECT id FROM chunk WHERE job_id = :id"), {"id": job.id}).scalar_one())


def make_worker(engine: Engine, kept: Path) -> Worker:
    def hang() -> None:
        raise AssertionError("it hangs")

    return Worker(
        name="bench",
        engine=engine,
        settings=Settings(embeddings=str(kept)),
        load_model=lambda name: load_model(find_model(name), "cpu"),
        load_detector=lambda asked: (_ for _ in ()).throw(AssertionError("no detector was asked")),
        draining=lambda: False,
        on_hang=hang,
    )


def timed_chunk(worker: Worker, chunk_id: int) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    report = run_chunk(worker, chunk_id)
    assert report is not None
    assert report.labeled == JOB_IMAGES
    return time.perf_counter() - wall, time.process_time() - cpu


def cpu_ms(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return 1000 * (time.process_time() - began)


# The report

SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "click": measure_clicks,
    "rounding": measure_rounding,
    "memory": measure_memory,
    "keep": measure_keeping,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--section", choices=SECTIONS, help="only this section, in this process")
    args = parser.parse_args()
    rows = measure_here(args.section) if args.section else [row for name in SECTIONS for row in measure_apart(name)]
    if args.json:
        print(json.dumps({"bars": [{**asdict(row), "holds": row.holds} for row in rows]}))
    else:
        print(table(rows))
    return int(not all(row.holds for row in rows))


def measure_here(section: str) -> list[Row]:
    keep_freed_memory()  # as the child does
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    return list(SECTIONS[section]())


def measure_apart(section: str) -> list[Row]:
    command = [sys.executable, __file__, "--json", "--section", section]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    rows = json.loads(done.stdout)["bars"]
    return [Row(**{name: value for name, value in row.items() if name != "holds"}) for row in rows]


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'value':>10}  {'bar':>8}  holds  name"]
    for row in rows:
        bar = "" if row.bar is None else f"{'<=' if row.at_most else '>='} {row.bar:g}"
        lines.append(f"{row.value:>10.4g}  {bar:>8}  {'yes' if row.holds else 'NO':5}  {row.name}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
