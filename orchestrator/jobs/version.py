"""What decides a job's masks besides the model: the text that goes into `model_version`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from workers.models.spec import ModelSpec
from workers.params import AutomaticParams, PromptParams, automatic_params
from workers.prompts import Prompt


def what_is_computed(spec: ModelSpec, params: Mapping[str, Any], label: str | None) -> dict[str, Any]:
    """Mode, prompts and parameters. The model's defaults are filled in, so giving a default value changes nothing."""
    effective = automatic_params(spec.defaults, params)
    values = {name: getattr(effective, name) for name in AutomaticParams.__dataclass_fields__}
    # How many points are decoded at once changes the memory, not the masks.
    values.pop("points_per_batch")
    return {"mode": "automatic", "params": _without_usual(values), "label": label}


def what_prompts_compute(sha256: str, params: Mapping[str, Any], label: str | None) -> dict[str, Any]:
    """The same for a job with prompts: equal exactly when the prompts of every asset are equal."""
    return {"mode": "prompts", "prompts": sha256, "params": prompt_params(params), "label": label}


def what_text_computes(text: Sequence[Prompt], params: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a job with phrases."""
    return {"mode": "text", "text": [phrase.as_json() for phrase in text], "params": prompt_params(params)}


def prompt_params(params: Mapping[str, Any]) -> dict[str, Any]:
    return _without_usual(asdict(PromptParams(**params)))


def _without_usual(values: dict[str, Any]) -> dict[str, Any]:
    """Leaves out decoder and threshold at their defaults. So jobs stored before these options existed stay valid."""
    usual = {"decoder": "torch", "text_threshold": 0.5}
    return {name: value for name, value in values.items() if (name, value) not in usual.items()}
