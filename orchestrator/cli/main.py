"""The command line, whole: importing the files of commands adds them to the root.

Results go to stdout, progress and logs to stderr. Exit 0: done. 1: some assets failed. 2: usage or environment.
130: interrupted.
"""

from __future__ import annotations

from orchestrator.cli import assist, export, jobs, label_studio, models, operate, review, submit, tune
from orchestrator.cli.app import app, opened
from orchestrator.cli.errors import errors_as_messages

__all__ = ["app", "assist", "export", "jobs", "label_studio", "main", "models", "operate", "review", "submit", "tune"]


def main() -> None:
    with errors_as_messages(), opened:
        app()
