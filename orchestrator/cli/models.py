"""`models list|pull|verify|push|export-onnx`: the models and their weights on this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from orchestrator.cli.app import USAGE, JsonOption, err, fail, models_app, print_json
from orchestrator.cli.request import require_weights
from orchestrator.terminal.console import printable, stdout_console
from orchestrator.terminal.progress import BYTES, bars_on
from workers.models.files import is_present, weights_path
from workers.models.loading import ONNX_LIBRARIES, missing_libraries, require_decoder, require_libraries
from workers.models.registry import find_model, known_models, with_base
from workers.paths import own_path


@models_app.command("list", epilog="Example: `maskfleet models list`")
def models_list(as_json: JsonOption = False) -> None:
    """List the models: which prompts they take, their size, and whether their weights are here."""
    specs, faults = known_models()
    for fault in faults:
        err.print(printable(fault), style="yellow", markup=False)
    if as_json:
        print_json(
            [
                {
                    "name": spec.name,
                    "family": spec.family,
                    "architecture": spec.architecture,
                    "base": spec.base,
                    "defaults": dict(spec.defaults),
                    "parameters": spec.parameter_count,
                    "prompts": list(spec.prompts),
                    "decoders": list(spec.decoders),
                    "missing_libraries": missing_libraries(spec.libraries),
                    "licence": spec.licence,
                    "present": is_present(spec),
                    "path": str(weights_path(spec)),
                }
                for spec in specs
            ]
        )
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "family", "parameters", "prompts", "licence", "weights"):
        table.add_column(column, no_wrap=column == "name")  # names are copied from here: the others are cut first
    for spec in specs:
        weights = "present" if is_present(spec) else "absent"
        if missing := missing_libraries(spec.libraries):
            weights += f", needs {' and '.join(missing)}"
        size = f"{spec.parameter_count / 1e6:.1f} M"
        table.add_row(spec.name, spec.family, size, ", ".join(spec.prompts), escape(spec.licence), weights)
    stdout_console().print(table)
    err.print("maskfleet models pull NAME    brings absent weights", style="dim")


ModelArgument = Annotated[str, typer.Argument(help="The model's name.", show_default=False)]


@models_app.command("pull", epilog="Example: `maskfleet models pull sam_vit_b`")
def models_pull(name: ModelArgument) -> None:
    """Bring a model's weights, from the mirror if one is set. Checks their sha256, goes on after a broken download."""
    from workers.models.pulling import Bringing, pull_named

    with byte_bar(name) as show:
        paths = pull_named(name, Bringing(progress=show))
    for path in paths:
        print(path)


@contextmanager
def byte_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on stderr while the block runs. Yields what is told how many of how many are done."""
    with bars_on(err) as bars:
        bar = bars.bar(escape(name), unit=BYTES)
        yield lambda done, total: bar.show(done, total)


@models_app.command("verify", epilog="Example: `maskfleet models verify sam_vit_b`")
def models_verify(name: ModelArgument) -> None:
    """Check a model's weights on this machine against their pinned size and sha256."""
    from workers.models.weights import remedy, verify

    for spec in with_base(find_model(name)):
        verified = verify(spec)
        print(f"{verified.path}: {verified.found}")
        if not verified.ok:
            fail(remedy(spec))


@models_app.command("push", epilog="Example: `maskfleet models push cells --to s3://weights/models`")
def models_push(
    name: ModelArgument,
    to: Annotated[
        str | None, typer.Option("--to", help="A folder or s3://bucket/prefix; default: MASKFLEET_WEIGHTS_MIRROR.")
    ] = None,
) -> None:
    """Put a model's weights, and the TOML of one's own, into the mirror that workers and `models pull` take it from."""
    from workers.models.pulling import push

    spec = find_model(name)
    with err.status(f"copying {name}"):
        stored = push(spec, to)
    for address in stored:
        print(address)


@models_app.command("export-onnx", epilog="Example: `maskfleet models export-onnx sam_vit_b`")
def models_export_onnx(
    name: ModelArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where it goes; default: the weights' folder, for `--decoder onnx`.")
    ] = None,
) -> None:
    """Write SAM's prompt encoder and mask decoder as one ONNX file, for `--decoder onnx` and for other programs."""
    spec = find_model(name)
    require_decoder(spec, "onnx")
    require_libraries("export-onnx", ONNX_LIBRARIES)
    require_weights(spec)
    # In a process of its own: it needs torch, which no command loads.
    where = [] if out is None else [str(own_path(out))]
    command = [sys.executable, "-P", "-m", "workers.models.onnx_export", name, *where]
    if subprocess.run(command, check=False).returncode:
        raise typer.Exit(USAGE)
