"""`rookery train`: check everything, then start the workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from launch.quiet import quiet_torch
from pipeline.streams import drop_unprintable
from pipeline.train.status import INTERRUPTED, RESUBMIT

_RESTARTS = 3


def train(
    config: Annotated[Path, typer.Argument(help="recipe, such as configs/demo.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., such as train.epochs=100")] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="training processes on each node (one per GPU); default: 1")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="nodes; run the same command on each of them")] = 1,
    rendezvous: Annotated[str | None, typer.Option(help="HOST:PORT of the first node, with several nodes")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per process; default: shared evenly")] = None,
    restarts: Annotated[
        int | None,
        typer.Option(min=0, help="start all processes again when one died, so often at most; default: 3"),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="print what would run, and check it, without training")] = False,
    images_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="--dry-run: rate of one process, to tell the hours from")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="submit it to Slurm, on --nodes whole nodes")] = False,
    time: Annotated[str | None, typer.Option(help="--slurm: time limit, such as 24:00:00")] = None,
    partition: Annotated[str | None, typer.Option(help="--slurm: partition")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="--slurm: any option of sbatch, such as --sbatch=--account=vision; repeat")
    ] = None,
    on_allocation: Annotated[
        bool, typer.Option("--on-allocation", help="inside a Slurm job: start the processes on all of its nodes")
    ] = False,
) -> None:
    """Train a model; the same command again continues a run that was stopped.

    Exit status: 0 finished, 2 a mistake in config, data or options, 1 a failure while training or a store without an
    answer; after a checkpoint 130
    when Ctrl-C or SIGTERM asked for it, and 75 when SIGUSR1 did, which means: submit it again.
    """
    _leave_on_signals()
    if not (dry_run or slurm):
        drop_unprintable()
    if nodes > 1:
        quiet_torch()
    # torch takes seconds to import; the other commands need not wait for it.
    from launch.slurm_job import run_on_nodes
    from launch.slurm_script import Request
    from pipeline.errors import UserError

    if (slurm or on_allocation) and rendezvous is not None:
        raise UserError("Slurm's jobs choose their own meeting point; leave --rendezvous out")
    if not slurm and (time or partition or sbatch):
        raise UserError("--time, --partition and --sbatch go with --slurm")
    if images_per_second is not None and not dry_run:
        raise UserError("--images-per-second goes with --dry-run")
    if on_allocation and (slurm or dry_run):
        raise UserError("--on-allocation trains on the nodes of this job; leave --slurm and --dry-run out")
    if on_allocation and nodes > 1:
        raise UserError("--on-allocation takes all nodes of this job; choose them for sbatch or salloc (--nodes=4)")
    request = Request(config, tuple(overrides or ()), nproc, threads, restarts)
    if on_allocation:
        raise typer.Exit(run_on_nodes(request))

    from launch.dry_run import print_forecast
    from launch.slurm_submit import submit
    from launch.summary import print_summary
    from launch.workers import Nodes, start_workers
    from pipeline.config_load import load_config, placing
    from pipeline.resolve import resolve
    from pipeline.tracking.files import check_place
    from pipeline.train.same_run import check_same_run
    from pipeline.wording import counted

    if slurm and nproc is None:
        raise UserError("--slurm needs to know how many processes (GPUs) a node has: --nproc 8")
    job = Nodes(nproc or 1, nodes, rendezvous)
    if not (dry_run or slurm) or rendezvous is not None:
        job.check()
    with placing(config, overrides or []):
        resolved = resolve(load_config(config, overrides or []), job.world_size)
    check_place(Path(resolved.config.out), "out=...")
    check_same_run(Path(resolved.config.out, resolved.config.name), resolved)
    print_summary(resolved, job)
    if dry_run or slurm:
        resolved.task.try_samples(resolved)
    if dry_run:
        print_forecast(resolved, job, images_per_second)
        return
    if slurm:
        named = {"--time": time, "--partition": partition}
        options = [f"{option}={value}" for option, value in named.items() if value is not None]
        submit(request, resolved.config, nodes, [*options, *(sbatch or ())])
        return
    where = "" if nodes == 1 else f" on this node; waiting for the others at {rendezvous}"
    typer.echo(f"starting {counted(job.nproc, 'process')}{where} ...")
    restarts = _RESTARTS if restarts is None else restarts
    status = start_workers("pipeline.train.worker", resolved.config.model_dump_json(), job, threads, restarts)
    if status in (INTERRUPTED, RESUBMIT):
        typer.echo("interrupted; the same command continues from the newest checkpoint", err=True)
    raise typer.Exit(status)


def _leave_on_signals() -> None:
    """Until there is something to save, with the statuses of later: to import torch takes seconds. Ctrl-C does so."""
    statuses: dict[int, int] = {signal.SIGTERM: INTERRUPTED, signal.SIGUSR1: RESUBMIT}

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(statuses[number])

    for number in statuses:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, leave)
