"""`rookery train`: check everything, then start the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="recipe, such as configs/demo.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., such as train.epochs=100")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="training processes on this node (one per GPU)")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="nodes; run the same command on each of them")] = 1,
    rendezvous: Annotated[str | None, typer.Option(help="HOST:PORT of the first node, with several nodes")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per process; default: shared evenly")] = None,
    dry_run: Annotated[bool, typer.Option(help="print what would run, and check it, without training")] = False,
) -> None:
    """Train a model; the same command again continues a run that was stopped.

    Exit status: 0 finished, 2 a mistake in config, data or options, 1 a failure while training; after a checkpoint 130
    when Ctrl-C or SIGTERM asked for it, and 75 when SIGUSR1 did, which means: submit it again.
    """
    # torch takes seconds to import; the other commands need not wait for it.
    from launch.summary import print_summary
    from launch.workers import Nodes, start_workers
    from pipeline.config_load import load_config
    from pipeline.resolve import resolve
    from pipeline.train.setup import try_samples
    from pipeline.train.stop import INTERRUPTED, RESUBMIT
    from pipeline.wording import counted

    job = Nodes(nproc, nodes, rendezvous)
    resolved = resolve(load_config(config, overrides or []), job.world_size)
    print_summary(resolved, job)
    if dry_run:
        try_samples(resolved)
        return
    typer.echo(f"starting {counted(job.nproc, 'process')} ...")
    status = start_workers("pipeline.train.worker", resolved.config.model_dump_json(), job, threads)
    if status in (INTERRUPTED, RESUBMIT):
        typer.echo("interrupted; the same command continues from the newest checkpoint", err=True)
    raise typer.Exit(status)
