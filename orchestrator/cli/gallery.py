"""`gallery`: pictures of a job, to be looked at before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from db import jobs
from orchestrator.cli.app import JobArgument, app, deployment_engine, err
from orchestrator.pages.choice import MAX_CARDS, Choice, Order
from orchestrator.pages.gallery import write_gallery
from orchestrator.terminal.jobs import read_job
from orchestrator.terminal.progress import bars_on
from workers.paths import own_path


@app.command(epilog="Example: `maskfleet gallery 12 --out look --sample 40 --order worst`")
def gallery(
    job: JobArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder of the page, index.html.", show_default=False)],
    sample: Annotated[
        int, typer.Option("--sample", min=1, max=MAX_CARDS, help="How many labeled assets to show.")
    ] = MAX_CARDS,
    failed: Annotated[bool, typer.Option("--failed", help="Only failed assets.")] = False,
    label: Annotated[
        str | None, typer.Option("--label", help="Only assets and masks with this label; `object` is no label.")
    ] = None,
    order: Annotated[
        Order, typer.Option("--order", help="Spread over the job, the lowest predicted IoU first, or at random.")
    ] = Order.LISTING,
) -> None:
    """Write a page with pictures of a job: what failed and why, then photos with their masks.

    It is one file below 5 MB, whatever the job's size: a large job is sampled, never read as a whole.
    """
    out = own_path(out)
    engine = deployment_engine()
    found, _ = read_job(engine, job)
    choice = Choice(limit=sample, label=label, order=order, only_failed=failed)
    with engine.connect() as db, bars_on(err) as bars:
        bar = bars.bar("pictures", None if failed else min(sample, jobs.count_job(db, job_id=job).labeled))
        bar.show(0)
        write_gallery(db, found, out / "index.html", choice=choice, progress=bar.advance)
    print(f"gallery: {out / 'index.html'}")
