"""Times `maskfleet run` on this machine alone: one worker on the CPU, and what `--devices auto` starts instead.

`python tests/benchmarks/local.py [--json] [--nano 24] [--vit-b 4]`: both sides take turns over the same drawn photos.
vit_b has random weights and 64 points. Whole commands are timed, with the start of their servers and workers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from PIL import Image
from segment_anything import sam_model_registry

from workers.machine import auto_devices
from workers.models.registry import find_model
from workers.training.scenes import draw_scene

MASKFLEET = [sys.executable, "-P", "-m", "orchestrator.cli"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--nano", type=int, default=24, help="photos for sam_nano")
    parser.add_argument("--vit-b", type=int, default=4, help="photos for vit_b; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows += sides(Path(folder), "sam_nano", args.nano, args.rounds, [])
        if args.vit_b:
            few = ["--param", "points_per_side=8"]
            rows += sides(Path(folder), random_vit_b(Path(folder)), args.vit_b, args.rounds, few)
    if args.json:
        print(json.dumps({"bars": rows}, indent=1))
    else:
        for row in rows:
            print(f"{row['name']:55} {row['value']:.3g}")


def sides(folder: Path, model: str, photos: int, rounds: int, words: list[str]) -> list[dict[str, object]]:
    """Images a second of both sides, the best of some rounds, and their ratio."""
    source = folder / f"photos-{model}"
    source.mkdir()
    for n in range(photos):
        Image.fromarray(draw_scene(7_000_000_000_000 + n, (768, 1024)).image).save(source / f"{n:03}.jpg", quality=90)
    seconds: dict[str, list[float]] = {"cpu": [], "auto": []}
    for turn in range(rounds):
        for devices in ("cpu", "auto") if turn % 2 == 0 else ("auto", "cpu"):
            seconds[devices].append(timed_run(folder, source, model, devices, words))
    one, auto = (photos / min(seconds[devices]) for devices in ("cpu", "auto"))
    workers = auto_devices(find_model("sam_vit_b" if model == "random" else model).size_bytes).count("cpu")
    return [
        {"name": f"{model}, {photos} photos: one worker, images a second", "value": one},
        {"name": f"{model}, {photos} photos: auto ({workers} workers), images a second", "value": auto},
        {"name": f"{model}, {photos} photos: auto, times one worker", "value": auto / one},
    ]


def timed_run(folder: Path, source: Path, model: str, devices: str, words: list[str]) -> float:
    out = Path(tempfile.mkdtemp(dir=folder))
    command = [*MASKFLEET, "run", str(source), "--out", str(out), "--model", model, "--devices", devices, *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")}
    environment["MASKFLEET_WEIGHTS_DIR"] = str(folder / "weights")
    began = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


def random_vit_b(folder: Path) -> str:
    """A vit_b with random weights as a model of one's own, named `random`."""
    torch.manual_seed(0)
    torch.save(sam_model_registry["vit_b"]().state_dict(), folder / "random.pth")
    environment = {**os.environ, "MASKFLEET_WEIGHTS_DIR": str(folder / "weights")}
    command = [*MASKFLEET, "models", "add", "random", str(folder / "random.pth"), "--architecture", "sam_vit_b"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return "random"


if __name__ == "__main__":
    main()
