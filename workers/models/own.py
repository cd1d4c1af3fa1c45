"""Models of one's own: NAME.safetensors in the weights folder, and beside it NAME.toml, which says what it is.

A folder, a mirror or another machine may have written the TOML. So it is bounded, and each value is checked.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from workers.models.files import weights_dir
from workers.models.spec import ModelSpec, WeightsError
from workers.params import parse_params

MAX_TOML_BYTES = 16_384
MAX_WEIGHTS_BYTES = 1 << 40

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
Name = Annotated[str, Field(pattern=f"^{_NAME}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Line = Annotated[str, Field(max_length=500)]


class OwnModel(BaseModel):
    """What NAME.toml says about NAME.safetensors. Strict: a number is never read from a text.

    architecture: the name of the registry whose modules the weights fit. sha256, size_bytes: of the file. origin: where
    it came from, for people. base, base_sha256: of a file that holds a mask decoder alone, the model that has all
    other tensors, and the sha256 of that model's file. defaults: numbers of AutomaticParams, where they
    are not the architecture's.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    name: Name
    architecture: Name
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=1, le=MAX_WEIGHTS_BYTES)]
    parameter_count: Annotated[int, Field(ge=1, le=MAX_WEIGHTS_BYTES)]
    origin: Line
    licence: Line
    added: date
    base: Name | None = None
    base_sha256: Sha256 | None = None
    defaults: dict[str, int | float] = {}

    @field_validator("defaults")
    @classmethod
    def _check_defaults(cls, values: dict[str, int | float]) -> dict[str, Any]:
        """By the rules of --param."""
        return parse_params({name: str(value) for name, value in values.items()})

    @model_validator(mode="after")
    def _check(self) -> OwnModel:
        if (self.base is None) != (self.base_sha256 is None):
            raise ValueError("base and base_sha256 go together")
        if self.base == self.name:
            raise ValueError("a model cannot be its own base")
        if not (self.origin.isprintable() and self.licence.isprintable()):
            raise ValueError("origin and licence are one line each")
        return self


def require_own_name(name: str) -> None:
    """Raise WeightsError unless a model of one's own may have this name. It becomes a file's name and a URL's part."""
    if not re.fullmatch(_NAME, name):
        raise WeightsError(
            f"{name[:120]!r} cannot be a model's name: expected letters, digits, `.`, `_` and `-`, at most 100, "
            "a letter or digit first"
        )


def toml_path(name: str) -> Path:
    """Where the TOML of this model is, or would be."""
    return weights_dir() / f"{name}.toml"


def weights_file(name: str) -> str:
    """The name of this model's weights in the weights folder, and in a mirror."""
    return f"{name}.safetensors"


def is_own(name: str) -> bool:
    """Whether the weights folder has a TOML of this name."""
    return re.fullmatch(_NAME, name) is not None and toml_path(name).is_file()


def own_names() -> list[str]:
    """The names for which the weights folder has a TOML, in order. Whether it can be read is not checked."""
    found = (path.stem for path in weights_dir().glob("*.toml"))
    return sorted(name for name in found if is_own(name))


def read_own(name: str) -> OwnModel:
    """What this model's TOML says. Raises WeightsError when it cannot be read or says something that cannot be."""
    path = toml_path(name)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TOML_BYTES + 1)
    except OSError as error:
        raise WeightsError(f"{name}: cannot read {path}: {error.strerror or error}") from error
    return parse_own(content, name=name, where=str(path))


def parse_own(content: bytes, *, name: str, where: str) -> OwnModel:
    """The same for bytes from anywhere. where: their address, for the message."""
    if len(content) > MAX_TOML_BYTES:
        raise WeightsError(f"{where}: more than {MAX_TOML_BYTES:,} bytes, expected the few lines of a model's TOML")
    try:
        values = tomllib.loads(content.decode())
        return OwnModel.model_validate({**values, "name": name})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        raise WeightsError(f"{where}: {wrong}; remove it, or add the model again") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number of ten thousand digits
        raise WeightsError(f"{where}: cannot be read as TOML ({error}); remove it, or add the model again") from error


def identity_of(spec: ModelSpec) -> dict[str, Any] | None:
    """What a job's row says about a model of one's own, JSON-safe. None for a model of the registry."""
    if not spec.is_own:
        return None
    said = {
        "architecture": spec.architecture,
        "sha256": spec.sha256,
        "base": spec.base,
        "base_sha256": spec.base_sha256,
        "defaults": dict(spec.own_defaults) or None,
    }
    return {key: value for key, value in said.items() if value is not None}


def require_same_model(spec: ModelSpec, asked: Mapping[str, Any] | None) -> None:
    """Raise WeightsError unless this is the model of one's own that a job means. asked: `identity_of` at submission."""
    here = identity_of(spec)
    if here != asked:
        known, meant = (_described(identity) for identity in (here, asked))
        raise WeightsError(
            f"{spec.name}: {known}, but the job was submitted with {meant}; give the two "
            "models two names, or bring the same file"
        )


def _described(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return "a model of the registry"
    return ", ".join(f"{key} {str(value)[:100]}" for key, value in sorted(identity.items()))


def remove_own(name: str, also: Sequence[Path] = ()) -> None:
    """Remove the model's TOML, then its weights and the files made from them. Raises WeightsError."""
    folder = weights_dir()
    try:
        for path in (toml_path(name), folder / weights_file(name), *also):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{name}: cannot remove {error.filename}: {error.strerror or error}") from error


def write_own(model: OwnModel) -> Path:
    """Write the model's TOML, whole or not at all. Its weights must be in place before. Raises WeightsError."""
    path = toml_path(model.name)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(toml_of(model))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise WeightsError(f"{model.name}: cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()
    return path


def toml_of(model: OwnModel) -> bytes:
    """The model as TOML. Its texts are printable, so JSON's way to write them is TOML's too."""
    lines = _lines(model.model_dump(exclude={"name", "defaults"}, exclude_none=True))
    if model.defaults:
        lines += ["", "[defaults]", *_lines(model.defaults)]
    return ("\n".join(lines) + "\n").encode()


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} = {value if isinstance(value, date) else json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
    ]
