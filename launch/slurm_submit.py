"""Submitting a run to Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from launch.slurm import slurm
from launch.slurm_script import LOGS, Request, standing_options, write_script
from launch.summary import print_summary
from launch.workers import Nodes
from pipeline.config_load import load_config, placing
from pipeline.errors import UserError
from pipeline.resolve import resolve
from pipeline.train.same_run import check_same_run
from pipeline.train.setup import try_samples


def submit(request: Request, nodes: int, options: Sequence[str], dry_run: bool) -> None:
    """Check a run, write its job script into its directory and submit that.

    Args:
        options: of sbatch, besides those that every job has.
        dry_run: only check.

    Raises:
        UserError: the run is not possible, or Slurm refuses the job.
    """
    if request.nproc is None:
        raise UserError("--slurm needs to know how many processes (GPUs) a node has: --nproc 8")
    job = Nodes(request.nproc, nodes)
    with placing(request.config, request.overrides):
        resolved = resolve(load_config(request.config, request.overrides), job.world_size)
    run = Path(resolved.config.out, resolved.config.name)
    check_same_run(run, resolved)
    print_summary(resolved, job)
    try_samples(resolved)
    if dry_run:
        return
    slurm("sbatch", "--version")
    is_new = not run.exists()
    standing = [*standing_options(resolved.config.name, run), f"--nodes={nodes}", "--exclusive", "--mem=0"]
    script = write_script(run, [*standing, *options], request.arguments())
    try:
        number = slurm("sbatch", "--parsable", str(script)).strip().split(";")[0]
    except UserError:
        if is_new:
            script.unlink()
            (run / LOGS).rmdir()
            run.rmdir()
        raise
    typer.echo(f"submitted job {number}: {script}\nlogs: {run / LOGS}")
