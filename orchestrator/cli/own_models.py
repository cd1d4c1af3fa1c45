"""`models add|remove`: models of one's own on this machine."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.app import USAGE, err, fail, models_app
from orchestrator.cli.models import ModelArgument, byte_bar
from workers.errors import redact
from workers.models.files import onnx_path, weights_dir
from workers.models.loading import require_libraries
from workers.models.own import is_own, remove_own
from workers.models.registry import MODELS, architecture_of, find_model, known_models, require_free_name
from workers.models.spec import ModelError, ModelSpec
from workers.paths import own_path

_TIMES_THE_WEIGHTS = 4  # a training script's file has an optimiser's state beside the weights


@models_app.command("add", epilog="Example: `maskfleet models add medsam medsam_vit_b.pth --architecture sam_vit_b`")
def models_add(
    name: Annotated[str, typer.Argument(help="The new model's name.", show_default=False)],
    file: Annotated[
        str, typer.Argument(help="A checkpoint (.pth, .safetensors): path, s3:// or https://.", show_default=False)
    ],
    architecture: Annotated[
        str, typer.Option("--architecture", help="The model of `maskfleet models list` that it is built as.")
    ],
    licence: Annotated[str, typer.Option("--licence", help="Its licence, for people.")] = "not said",
    origin: Annotated[str | None, typer.Option("--origin", help="Where it is from; default: FILE.")] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", help="FILE's sha256, 64 hex digits; an address needs it.")
    ] = None,
) -> None:
    """Add a checkpoint of one's own as a model: checked, stored as safetensors, named in every job from then on."""
    require_free_name(name)
    built = architecture_of(architecture)
    require_libraries(architecture, built.libraries)
    if sha256 is not None and (len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef")):
        fail(f"--sha256 {sha256[:80]}: expected 64 hex digits")
    texts = (origin if origin is not None else redact(file), licence)
    for text in texts:
        if len(text) > 500 or not text.isprintable():
            fail(f"{text[:80]!r}: origin and licence are one line of at most 500 characters each")
    with _here(name, file, sha256, built) as path:
        # In a process of its own: it needs torch, which no command loads.
        command = [sys.executable, "-P", "-m", "workers.models.adding", name, str(path), architecture, *texts]
        code = subprocess.run(command, check=False).returncode
    if code < 0:
        fail(f"{path}: reading it ended by signal {-code}; is there memory for the whole file?")
    if code:
        raise typer.Exit(USAGE)


@contextmanager
def _here(name: str, file: str, sha256: str | None, built: ModelSpec) -> Iterator[Path]:
    """The checkpoint as a file of this machine, with the stated sha256. What was downloaded is removed at the end."""
    if "://" not in file:
        path = own_path(file).absolute()
        if not path.is_file():
            fail(f"{path}: no such file")
        if sha256 is not None:
            with path.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != sha256.lower():
                fail(f"{path}: its sha256 is {found}, expected {sha256.lower()}")
        yield path
        return
    if sha256 is None:
        fail("an address needs --sha256 of the file, so that nobody on the way can change it")
    from workers.models.pulling import fetched

    most_bytes = _TIMES_THE_WEIGHTS * built.size_bytes + (64 << 20)
    with (
        byte_bar(name) as show,
        fetched(file, name=name, sha256=sha256.lower(), max_bytes=most_bytes, show=show) as path,
    ):
        yield path


@models_app.command("remove", epilog="Example: `maskfleet models remove medsam`")
def models_remove(
    name: ModelArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, also when other models are built on it.")] = False,
) -> None:
    """Remove a model of one's own from this machine. A mirror keeps its copy."""
    if name in MODELS:
        fail(f"{name} belongs to the registry: only a model that was added is removed")
    if not is_own(name):
        find_model(name)
    above = [spec.name for spec in known_models()[0] if spec.base == name]
    if above:
        err.print(f"{', '.join(above)} cannot be loaded without {name}", style="yellow", markup=False)
    if not yes and (above or not typer.confirm(f"remove {name}?", err=True)):
        fail(f"{name} was not removed{'; --yes removes it in spite of that' if above else ''}")
    remove_own(name, also=_made_from(name))
    print(f"removed {name} from {weights_dir()}")


def _made_from(name: str) -> list[Path]:
    """The exported decoder of these weights. A model whose TOML is wrong has none that could be used."""
    try:
        return [onnx_path(find_model(name))]
    except ModelError:
        return []
