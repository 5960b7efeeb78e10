"""`rookery eval`: exact-once evaluation of a run's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError


def evaluate(
    run: Annotated[Path, typer.Argument(help="run directory, or a directory with model.safetensors and config.json")],
    data: Annotated[str | None, typer.Option(help="split to evaluate on; default: the run's data.val")] = None,
    weights: Annotated[str, typer.Option(help="of a run directory: final or best")] = "final",
    nproc: Annotated[int, typer.Option(min=1, help="processes on this node")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="samples per process and forward")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="loader processes per process")] = 2,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: the run's, else fp32")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per process; default: shared evenly")] = None,
    output: Annotated[str, typer.Option(help="also write the JSON result to this file")] = "",
) -> None:
    """Evaluate on every sample of a split exactly once and print one line of JSON.

    Exit status: 0 evaluated, 2 a mistake in the arguments.
    """
    from launch.workers import Nodes, start_workers
    from pipeline.config_load import parse_tree
    from pipeline.tracking.run_dir import RunDir
    from pipeline.train.eval_worker import EvalJob, payload
    from pipeline.train.export import MODEL_CONFIG

    directory = run
    if not (run / MODEL_CONFIG).is_file():
        saved = RunDir.saved_config(run)
        if saved is None:
            raise UserError(f"{run}: neither a run directory (config.yaml) nor exported weights ({MODEL_CONFIG})")
        config = parse_tree(saved, str(run / "config.yaml"))
        data, precision = data or config.data.val, precision or config.train.precision
        directory = run / weights
        if not (directory / MODEL_CONFIG).is_file():
            present = [name for name in ("best", "final") if (run / name / MODEL_CONFIG).is_file()]
            raise UserError(
                f"{directory}: no such weights; the run has {' and '.join(present) or 'none yet'}"
                + (f", choose with --weights {present[0]}" if present else ", train it to its end first")
            )
    if data is None:
        raise UserError(f"{run}: which split? pass --data DIRECTORY")
    if precision not in (None, "fp32", "bf16", "fp16"):
        raise UserError(f"--precision {precision}: choose fp32, bf16 or fp16")
    job = EvalJob(str(directory), data, batch_size, workers, precision or "fp32", output)
    raise typer.Exit(start_workers("pipeline.train.eval_worker", payload(job), Nodes(nproc), threads))
