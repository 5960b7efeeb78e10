"""Submitting a run to Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from launch.slurm import slurm
from launch.slurm_script import LOGS, Request, standing_options, write_script
from pipeline.config import RunConfig
from pipeline.errors import UserError


def submit(request: Request, config: RunConfig, nodes: int, options: Sequence[str]) -> None:
    """Write the job script of a run that was checked into its directory and submit that.

    Args:
        config: of the run.
        options: of sbatch, besides those that every job has.

    Raises:
        UserError: the script can't be written, or Slurm refuses the job.
    """
    run = Path(config.out, config.name)
    slurm("sbatch", "--version")
    is_new = not run.exists()
    standing = [*standing_options(config.name, run), f"--nodes={nodes}", "--exclusive", "--mem=0"]
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
