"""`doctor`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from orchestrator.cli.app import USAGE, JsonOption, app, print_json
from orchestrator.local.doctor import examine
from orchestrator.terminal.console import stdout_console


@app.command(epilog="Example: `maskfleet doctor s3://bucket/street`")
def doctor(
    source: Annotated[
        str | None, typer.Argument(help="Also try to list this: a folder, or s3://bucket/prefix.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show on one screen what is reachable, who is at work, what is missing, and how to fix it."""
    findings = examine(source)
    if as_json:
        print_json([{"what": f.what, "ok": f.ok, "found": f.found, "remedy": f.remedy} for f in findings])
    else:
        table = Table("", "", Column(overflow="fold"), box=None, pad_edge=False, show_header=False)  # paths are not cut
        for finding in findings:
            mark = {True: "[green]ok[/green]", False: "[red]missing[/red]", None: "[dim]not set[/dim]"}[finding.ok]
            table.add_row(mark, f"[bold]{finding.what}[/bold]", Text(finding.found))
            if finding.remedy:
                table.add_row("", "", Text(finding.remedy, style="dim"))
        stdout_console().print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(USAGE)
