"""A training's state in one safetensors file, so that it goes on after Ctrl-C. Nothing in the file is executed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers.tuning.plan import CHECKPOINT_NAME, TuneError
from workers.tuning.training import Run

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of each parameter, beside its number of steps


def save_run(run: Run, folder: Path) -> None:
    """Write the run's state, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, value in run.sam.mask_decoder.named_parameters():
        tensors[f"parameter.{name}"] = value.detach()
        tensors[f"average.{name}"] = run.average[name]
        state = run.optimizer.state.get(value, {})
        tensors |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS if moment in state}
    state_json = json.dumps({"step": run.step, "seconds": run.seconds, "seed": run.seed})
    part = folder / f".{CHECKPOINT_NAME}.part"
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, part, {"state": state_json})
    part.replace(folder / CHECKPOINT_NAME)


def load_run(run: Run, folder: Path) -> bool:
    """Bring a run that has just begun to the state in the folder. False when there is none.

    Raises TuneError for a file that is damaged, or of another seed or another decoder.
    """
    path = folder / CHECKPOINT_NAME
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            step, seconds, seed = int(state["step"]), float(state["seconds"]), int(state["seed"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise TuneError(f"{path}: cannot be read ({error}); remove it to train from the start") from error
    if seed != run.seed or step < 0 or not 0 <= seconds < 1e9:
        raise TuneError(f"{path}: of seed {seed} at step {step}, expected seed {run.seed}; remove it to start again")
    _load_tensors(run, tensors, step, path)
    run.step, run.seconds = step, seconds
    return True


def _load_tensors(run: Run, tensors: dict[str, Tensor], step: int, path: Path) -> None:
    moments = _MOMENTS if step else ()
    for name, value in run.sam.mask_decoder.named_parameters():
        wanted = [tensors.get(f"{kind}.{name}") for kind in ("parameter", "average", *moments)]
        if any(found is None or found.shape != value.shape for found in wanted):
            raise TuneError(f"{path}: {name} is absent or of another shape; remove it to train from the start")
        parameter, average, *state = (found.to(value.device, value.dtype) for found in wanted if found is not None)
        with torch.no_grad():
            value.copy_(parameter)
        run.average[name] = average
        if state:
            run.optimizer.state[value] = {"step": torch.tensor(float(step)), **dict(zip(moments, state, strict=True))}
