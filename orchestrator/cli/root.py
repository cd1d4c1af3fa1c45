"""The root of the command line. It knows each command's sentence, and imports the file of the one that runs."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

# Each command with its file and its sentence, in the order in which people need them: make a job, look at it, export
# its masks, review, operate. `--help` and completion read only this, because the files import much.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("submit", "Label the sample scenes that come with maskfleet. Some of them are broken on purpose."),
    "run": ("submit", "Label a folder or bucket on this machine alone, with nothing installed or started."),
    "submit": ("submit", "Make a job on the deployment, and print its number."),
    "watch": ("jobs", "Follow a job until it is over; exits 1 when assets failed, or when there was nothing to label."),
    "jobs": ("jobs", "List the newest jobs."),
    "show": ("jobs", "Show one job: its progress, what was skipped, what failed and why."),
    "gallery": ("gallery", "Write a page with pictures of a job: what failed and why, then photos with their masks."),
    "priority": ("jobs", "Change a job's priority: its share of the workers from now on."),
    "cancel": ("jobs", "Stop a job. Its labeled assets stay, and `resume` goes on."),
    "resume": ("jobs", "Let a cancelled, paused or failed job go on where it stopped."),
    "retry": ("jobs", "Try a job's failed assets again."),
    "delete": ("delete", "Delete a job with its masks, prompts and kept embeddings. Cancel a running job first."),
    "export": (
        "export",
        "Write a job's masks as COCO, YOLO, PNG, Label Studio or Parquet files, streaming.",
    ),
    "label-studio": ("label_studio", "Projects of Label Studio, where people correct masks."),
    "publish": ("label_studio", "Bring a job's assets into a Label Studio project, with their masks as predictions."),
    "assist": ("assist", "Answer reviewers' clicks and boxes in Label Studio with masks, until SIGTERM or Ctrl-C."),
    "review": (
        "review",
        "Read how people changed a job's masks in Label Studio. Count what they kept, edited, deleted and added.",
    ),
    "tune": (
        "tune",
        "Teach the mask decoder of a job's model what people corrected in Label Studio. Only its decoder changes.",
    ),
    "board": (
        "board",
        "Serve a page of all jobs, live and read-only, behind a password, until SIGTERM or Ctrl-C.",
    ),
    "models": ("own_models", "The models, and their weights on this machine."),
    "worker": (
        "operate",
        "Run one worker process on each CUDA device (or the CPU) and restart dead ones. SIGTERM drains them.",
    ),
    "dispatch": ("operate", "List new jobs, keep the queue full, and take back the work of dead workers."),
    "migrate": ("migrate", "Bring the database's tables to this version; safe to run twice."),
    "config": ("config", "Show every setting with its value here and where it came from. Secrets are hidden."),
    "doctor": ("doctor", "Show on one screen what is reachable, who is at work, what is missing, and how to fix it."),
}


class _Lazy(TyperGroup):
    """Its commands are names with sentences. The one that is to run is imported when its name was read."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.imported = self.commands
        self.commands = {name: TyperCommand(name, help=sentence) for name, (_, sentence) in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = imported_command(name)
        return name, command, rest


def imported_command(name: str) -> Any:
    """The command of this name, from its file."""
    # What an import makes stays. Looking through it for garbage again and again took a tenth of a short command.
    gc.disable()
    try:
        import_module(f"orchestrator.cli.{COMMANDS[name][0]}")
    finally:
        gc.enable()
    root = typer.main.get_command(app)
    assert isinstance(root, _Lazy)
    return root.imported[name]


app = typer.Typer(
    name="maskfleet",
    cls=_Lazy,
    help="Masks on every image of a folder or bucket before people start work.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help=COMMANDS["models"][1], no_args_is_help=True)
app.add_typer(models_app, name="models")
label_studio_app = typer.Typer(help=COMMANDS["label-studio"][1], no_args_is_help=True)
app.add_typer(label_studio_app, name="label-studio")

opened = ExitStack()  # what the arguments of a command opened; `main` closes it


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        print(version("maskfleet"))
        raise typer.Exit


@app.callback()
def _root(
    wanted: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Masks on every image of a folder or bucket before people start work."""
