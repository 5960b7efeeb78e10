"""`rookery eval`: exact-once evaluation of a run's weights, and the search for the best crop ratio."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.train.eval_worker import EvalJob

_PRECISIONS = ("fp32", "bf16", "fp16")


def evaluate(
    run: Annotated[Path, typer.Argument(help="run directory, or a directory with model.safetensors and config.json")],
    data: Annotated[
        str | None, typer.Option(help="directory or address of the split; default: the run's data.val")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="of a run: final, best, or last (newest checkpoint); default: final, else last")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="processes on this node")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="samples per process and forward")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="loader processes per process")] = 2,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: the run's, else fp32")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per process; default: shared evenly")] = None,
    crop_pct: Annotated[
        float | None, typer.Option(help="crop ratio, input size / resized shorter side; above 1 adds a black frame")
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(help="find the best crop ratio of FIRST:LAST:STEP (0.8:1.2:0.05) or of a list (0.9,1)")
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            help="with --calibrate: part of the samples, by a hash of their keys, that the best ratio is "
            "measured and not chosen on; 0: choose and measure on all; default: 0.5"
        ),
    ] = None,
    aux_weight: Annotated[
        float | None,
        typer.Option(help="Refiner with an aux head: weight of its largest logits; 0: the class token alone"),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="folder of this node for shards from an address; default: the run's data.cache")
    ] = None,
    cache_gb: Annotated[
        float | None, typer.Option(min=0.001, help="GB that it may hold; default: the run's data.cache_gb")
    ] = None,
    output: Annotated[str, typer.Option(help="also write the JSON result to this file")] = "",
    predictions: Annotated[
        str,
        typer.Option(
            help="write what was predicted to this .csv, .tsv or .jsonl: a line for every sample, in the split's order"
        ),
    ] = "",
) -> None:
    """Evaluate on every sample of a split exactly once and print one line of JSON.

    Exit status: 0 evaluated, 2 a mistake in the arguments.
    """
    from launch.workers import Nodes, start_workers
    from pipeline.train.calibrate import parse_ratios
    from pipeline.train.eval_worker import payload

    _check_numbers(precision, crop_pct, calibrate, holdout)
    if aux_weight is not None and not (math.isfinite(aux_weight) and aux_weight >= 0):
        raise UserError(f"--aux-weight {aux_weight:g}: a weight of logits, 0 or above")
    check_file(output, "--output")
    _check_predictions(predictions, output, calibrate)
    job = find_job(run, weights, data, precision)
    if predictions and job.task == "generate":
        raise UserError(f"{run}: a generator predicts nothing; leave out --predictions, or see `rookery generate`")
    job = replace(
        job,
        batch_size=batch_size,
        workers=workers,
        output=output,
        predictions=predictions,
        crop_pct=crop_pct,
        aux_weight=aux_weight,
        ratios=[] if calibrate is None else parse_ratios(calibrate),
        holdout=0.5 if holdout is None else holdout,
        cache=replace(job.cache, directory=cache or job.cache.directory, gigabytes=cache_gb or job.cache.gigabytes),
    )
    if job.step is not None:
        typer.echo(f"evaluating the checkpoint of step {job.step}: {job.weights}", err=True)
    raise typer.Exit(start_workers("pipeline.train.eval_worker", payload(job), Nodes(nproc), threads))


def _check_numbers(precision: str | None, crop_pct: float | None, calibrate: str | None, holdout: float | None) -> None:
    if precision is not None and precision not in _PRECISIONS:
        raise UserError(f"--precision {precision}: choose fp32, bf16 or fp16")
    if crop_pct is not None and calibrate is not None:
        raise UserError("--crop-pct evaluates with one ratio, --calibrate searches several; choose one of them")
    if holdout is not None and calibrate is None:
        raise UserError("--holdout is the part that --calibrate does not choose on; add --calibrate, or leave it out")
    if holdout is not None and not 0 <= holdout < 1:
        raise UserError(f"--holdout {holdout:g}: a part of the samples, at least 0 and below 1")


def _check_predictions(predictions: str, output: str, calibrate: str | None) -> None:
    from pipeline.train.predictions import SUFFIXES

    if not predictions:
        return
    if Path(predictions).suffix not in SUFFIXES:
        raise UserError(f"{predictions}: the name says how to write --predictions; let it end in {', '.join(SUFFIXES)}")
    if calibrate is not None:
        raise UserError("--predictions are those of one crop ratio; take one with --crop-pct instead of --calibrate")
    check_file(predictions, "--predictions")
    if output and Path(output).resolve() == Path(predictions).resolve():
        raise UserError(f"{output}: the file of --output and of --predictions; choose another one for either")


def check_file(name: str, option: str) -> None:
    """Find out now, rather than after hours of evaluation, that a file can't be written.

    Args:
        name: of the file; empty where none is asked for.
        option: what the user should choose another value of.

    Raises:
        UserError: it can't.
    """
    if not name:
        return
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file for {option}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: can't be written (there is no folder {path.parent}); choose another {option}")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{path}: can't be written (no permission); choose another {option}")
    if path.exists() and not path.is_file():
        return  # a device or a pipe, which is written to; of others a new file takes the place
    try:
        with TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); choose another {option}") from error


def find_job(run: Path, weights: str | None, data: str | None, precision: str | None) -> EvalJob:
    """What to evaluate, and what the run's config says about how.

    Raises:
        UserError: there is nothing to evaluate there, or no split to do it on.
    """
    from pipeline.config_load import parse_tree
    from pipeline.tracking.run_data import data_of_run
    from pipeline.tracking.run_dir import CONFIG_NAME, RunDir
    from pipeline.train.eval_worker import EvalJob
    from pipeline.train.export import MODEL_CONFIG, exported_task

    if not run.is_dir():
        raise UserError(f"{run}: {_no_directory(run)}; name a run directory (runs/<name>) or one with exported weights")
    if (run / MODEL_CONFIG).is_file():
        if weights is not None:
            raise UserError(f"{run}: no run, there is nothing to choose from with --weights {weights}; leave it out")
        if data is None:
            raise UserError(f"{run}: which split? pass --data DIRECTORY")
        return EvalJob(str(run), data, precision=precision or "fp32", task=exported_task(run))
    saved = RunDir.saved_config(run)
    if saved is None:
        raise UserError(
            f"{run}: neither a run directory ({CONFIG_NAME}) nor exported weights ({MODEL_CONFIG}){_runs_in(run)}"
        )
    config = parse_tree(saved, str(run / CONFIG_NAME))
    if data is None and config.data.val is not None:
        data = data_of_run(run, config.data.val)
    if data is None:
        raise UserError(f"{run}: which split? pass --data DIRECTORY")
    directory, step = _weights_of(run, weights)
    return EvalJob(
        str(directory),
        data,
        str(run),
        step,
        precision=precision or config.train.precision,
        cache=config.data.cache_options(),
        task=config.task.kind,
        deterministic=config.train.deterministic,
    )


def _weights_of(run: Path, weights: str | None) -> tuple[Path, int | None]:
    """Exported weights of a run, or its newest complete checkpoint with its step."""
    from pipeline.train.checkpoint import CheckpointStore
    from pipeline.train.export import MODEL_CONFIG

    exported = [name for name in ("best", "final") if (run / name / MODEL_CONFIG).is_file()]
    wanted = weights or ("final" if "final" in exported else "last")
    if wanted in exported:
        return run / wanted, None
    if wanted == "last":
        store = CheckpointStore(run / "checkpoints")
        newest = store.newest()
        if newest is not None:
            return newest.path, newest.step
        damage = store.damage()
        if damage is not None:
            other = f"choose --weights {exported[0]}" if exported else "train the run again, which begins anew"
            raise UserError(f"{run}: no last weights; {damage}; restore its files from a copy, or {other}")
        if weights is None:
            raise UserError(f"{run}: no final weights and no complete checkpoint yet; train it first")
    has_checkpoint = any((run / "checkpoints").glob("step-*"))
    there = exported + (["last"] if has_checkpoint and wanted != "last" else [])
    raise UserError(
        f"{run / wanted}: no such weights; the run has {' and '.join(there) or 'none yet'}"
        + (f", choose with --weights {there[0]}" if there else ", train it first")
    )


def _no_directory(path: Path) -> str:
    return "a file" if path.exists() else "no such directory"


def _runs_in(folder: Path) -> str:
    from pipeline.tracking.runs import is_run

    runs = sorted(path.name for path in folder.iterdir() if is_run(path))
    return f"; it holds the runs {', '.join(runs)}: name one of them" if runs else ""
