"""The tuned decoder as a model of one's own: NAME.safetensors and NAME.toml in the weights folder."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workers.models.files import encoder_of, weights_dir
from workers.models.own import OwnModel, is_own, require_own_name, weights_file, write_own
from workers.models.registry import MODELS, find_model
from workers.tuning.plan import Plan, TuneError


def require_free_name(name: str) -> None:
    """Raise unless a new model may have this name."""
    require_own_name(name)
    if name in MODELS or is_own(name):
        raise TuneError(f"{name} is a model already: choose another --name, or `maskfleet models list` shows them")


def install(plan: Plan, decoder: Path, defaults: Mapping[str, Any]) -> OwnModel:
    """Copy the decoder into the weights folder, then write its TOML, which makes it a model. Raises WeightsError.

    defaults: of automatic masks, where they are not those of the model that was tuned.
    """
    require_free_name(plan.name)
    spec = find_model(plan.model)
    base, base_sha256 = encoder_of(spec)
    target = weights_dir() / weights_file(plan.name)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(decoder, part)
        content = part.read_bytes()
        part.replace(target)
    except OSError as error:
        raise TuneError(f"{plan.name}: cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()
    model = OwnModel(
        name=plan.name,
        architecture=spec.architecture,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        parameter_count=count_parameters(content),
        origin=f"tuned from {spec.name} by job {plan.job} and project {plan.project}"[:500],
        licence=spec.licence,
        added=datetime.now(UTC).date(),
        base=base,
        base_sha256=base_sha256,
        defaults={**spec.own_defaults, **defaults},
    )
    write_own(model)
    return model


def count_parameters(content: bytes) -> int:
    """The values in a safetensors file, by its header: JSON after 8 bytes with its length."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for side in tensor["shape"]:
                count *= side
            total += count
    return total
