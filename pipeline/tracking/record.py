"""One run in figures: what it is, how far it came, what it measured and what it cost. Writes nothing."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from pipeline.errors import UserError
from pipeline.tracking.files import encode_floats, read_json, read_lines
from pipeline.tracking.metric_names import lower_is_better
from pipeline.tracking.metrics import METRICS_NAME, POSITION, read_metrics
from pipeline.tracking.published import dataset_name
from pipeline.tracking.run_dir import FACTS_NAME, RESULT_NAME, SESSIONS_NAME, RunDir
from pipeline.tracking.runs import RunState, exists, find_runs, run_state
from pipeline.tracking.work_clock import WorkClock
from pipeline.trees import flatten

Columns = dict[str, list[float | None]]

# A forward pass costs 2 operations per multiply-add, the backward pass twice as much again.
FLOPS_PER_MAC = 6
_AXES = ("step", "samples", "epoch", "hours")
_NOT_CURVES = {*POSITION, "count"}
# What is read of a run's two JSON files, and its types there; a figure may be missing.
_NUMBER = (int, float)
_Types = dict[str, type | tuple[type, ...]]
_FACTS: _Types = {"model_params": int, "model_macs": int, "total_steps": int, "total_epochs": _NUMBER, "datasets": dict}
_RESULT: _Types = {"step": int, "samples": int, "params": int, "top1": _NUMBER, "best": dict, "wall_seconds": _NUMBER}


@dataclass(frozen=True)
class RunSummary:
    """A run in figures; None where it is not known (yet).

    Attributes:
        name: the directory's name.
        path: the directory.
        state: running, finished, stopped (as planned, before the schedule's end), failed, interrupted (it ended in
            order, to be resumed), killed, or unknown.
        config: resolved config, flat (`train.epochs`).
        params: model parameters.
        step, total_steps, epoch, total_epochs: how far it is, and how far it goes.
        final_top1, best_top1: fractions of 1. `best_step` is where the best was measured.
        train_loss: the newest.
        images_per_second: of all processes together, median over the training lines.
        wall_hours: time in which a process worked on it, over all sessions.
        ended: time of its last sign of life, in seconds since 1970.
        curve: (step, top-1) of every evaluation.
        dataset: what it was trained on; see `published.dataset_name`.
        fingerprint: of the contents of its training and its validation data.
        macs: multiply-adds of one image's forward pass.
        samples: images it was trained on, repetitions counted.
        train_flops: operations of the training so far: 3 forward passes of 2 operations per multiply-add and image.
        memory_gb: highest memory of the process of rank 0 while training.
        processes: of the newest session; with GPUs, one for each.
        gpu_hours: hours times processes.
        evals: every evaluation by column: `step`, `samples`, `epoch`, `hours` (of work) and what was measured; None
            where an evaluation lacks a figure.
        train: the same of every training line.
    """

    name: str
    path: Path
    state: RunState
    config: dict[str, Any]
    params: int | None
    step: int | None
    total_steps: int | None
    epoch: float | None
    total_epochs: float | None
    final_top1: float | None
    best_top1: float | None
    best_step: int | None
    train_loss: float | None
    images_per_second: float | None
    wall_hours: float | None
    curve: list[tuple[int, float]]
    dataset: str | None = None
    fingerprint: str | None = None
    macs: int | None = None
    samples: int | None = None
    train_flops: float | None = None
    memory_gb: float | None = None
    processes: int | None = None
    gpu_hours: float | None = None
    ended: float | None = None
    evals: Columns = field(default_factory=dict)
    train: Columns = field(default_factory=dict)

    def final(self, metric: str) -> float | None:
        """The newest figure of an evaluation; of top-1 that of `result.json`, where there is one."""
        if metric == "top1":
            return self.final_top1
        return next(iter(reversed(_given(self.evals.get(metric, ())))), None)

    def best(self, metric: str) -> float | None:
        """The best figure of all evaluations."""
        if metric == "top1":
            return self.best_top1
        numbers = [value for value in _given(self.evals.get(metric, ())) if not math.isnan(value)]
        return (min if lower_is_better(metric) else max)(numbers, default=None)


def summarize(path: Path) -> RunSummary:
    """Read one run directory.

    Raises:
        UserError: one of its files is damaged, or there is nothing in them.
    """
    try:
        run = _summarize(path)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} holds what no run wrote ({what}); restore it or leave it out") from error
    if not run.config and run.step is None:
        raise UserError(f"{path} is empty: neither a config nor a measurement; delete it or leave it out")
    return run


def summarize_all(paths: Sequence[Path]) -> tuple[list[RunSummary], list[str]]:
    """Every run among `paths` and in the folders among them, and why others are left out.

    Raises:
        UserError: a path doesn't exist, or no run is left.
    """
    runs: dict[Path, RunSummary] = {}  # by what their paths lead to: one run may be reached on several ways
    left_out: list[str] = []
    for path in paths:
        try:
            found = find_runs([path])
        except UserError as error:
            if not exists(path):
                raise
            left_out.append(str(error))
            continue
        for run in found:
            try:
                runs.setdefault(run.resolve(), summarize(run))
            except UserError as error:
                left_out.append(str(error))
    if not runs:
        raise UserError("; ".join(dict.fromkeys(left_out)))
    return list(runs.values()), list(dict.fromkeys(left_out))


def metrics_of(runs: Iterable[RunSummary]) -> list[str]:
    """What evaluations measured, top-1 first."""
    names = dict.fromkeys(name for run in runs for name in run.evals if name not in _AXES)
    return sorted(names, key=lambda name: name != "top1")


def _summarize(path: Path) -> RunSummary:
    lines = read_metrics(path)
    facts = _read_object(path / FACTS_NAME, _FACTS)
    result = _read_object(path / RESULT_NAME, _RESULT)
    state = run_state(path)
    # Every run writes a line at its last step; one that was started again over an old result may not have come to it.
    trained = result.get("step") or (state in ("finished", "stopped") and (path / METRICS_NAME).exists())
    if not lines and state != "running" and trained:
        raise UserError(
            f"{path / METRICS_NAME} is damaged: the run is {state}, but no line of its metrics can be read; restore it "
            "or leave the run out"
        )
    sessions = read_lines(path / SESSIONS_NAME)
    clock = WorkClock.of(sessions, lines)
    measured = [line for line in lines if line["kind"] in ("train", "eval")]
    evals = _columns([line for line in lines if line["kind"] == "eval"], clock)
    train = _columns([line for line in lines if line["kind"] == "train"], clock)
    curve = [
        (int(step or 0), top1)
        for step, top1 in zip(evals["step"], evals.get("top1", [None] * len(evals["step"])), strict=True)
        if top1 is not None
    ]
    best = result.get("best") or {}
    if not best and curve:
        step, top1 = max(curve, key=lambda point: -math.inf if math.isnan(point[1]) else point[1])
        best = {"top1": top1, "step": step}
    macs = facts.get("model_macs")
    datasets = facts.get("datasets") or {}
    for split, dataset in datasets.items():
        if not isinstance(dataset, dict):
            raise _not_written(path / FACTS_NAME, f"datasets.{split}", dataset)
    samples = max((line["samples"] for line in measured), default=result.get("samples"))
    wall_seconds = result.get("wall_seconds")
    speeds, losses, memory = (_given(train.get(name, ())) for name in ("images_per_second", "loss", "memory_gb"))
    return RunSummary(
        name=path.resolve().name,
        path=path,
        state=state,
        config=flatten(RunDir.saved_config(path) or {}),
        params=facts.get("model_params", result.get("params")),
        step=max((line["step"] for line in measured), default=result.get("step")),
        total_steps=facts.get("total_steps"),
        epoch=max((line["epoch"] for line in measured), default=None),
        total_epochs=facts.get("total_epochs"),
        final_top1=result.get("top1", curve[-1][1] if curve else None),
        best_top1=best.get("top1"),
        best_step=best.get("step"),
        train_loss=losses[-1] if losses else None,
        images_per_second=statistics.median(speeds) if speeds else None,
        wall_hours=clock.hours if clock.spans or wall_seconds is None else wall_seconds / 3600,
        curve=curve,
        dataset=dataset_name(datasets.get("train")),
        fingerprint=" ".join((datasets[split].get("fingerprint") or "")[:12] for split in sorted(datasets)) or None,
        macs=macs,
        samples=samples,
        train_flops=float(FLOPS_PER_MAC * macs * samples) if macs is not None and samples is not None else None,
        memory_gb=max(memory, default=None),
        processes=clock.spans[-1][2] if clock.spans else None,
        gpu_hours=clock.process_hours,
        ended=max((entry["time"] for entry in (*sessions, *lines)), default=None),
        evals=evals,
        train=train,
    )


def _read_object(path: Path, types: _Types) -> dict[str, Any]:
    """A JSON file with keys, their values of these types or null; empty where there is no file."""
    content = read_json(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} isn't what a run wrote (it has no keys); restore it or leave the run out")
    for name, kind in types.items():
        if not isinstance(content.get(name), (kind, NoneType)):
            raise _not_written(path, name, content[name])
    return content


def _not_written(path: Path, name: str, value: Any) -> UserError:
    shown = json.dumps(encode_floats(value))
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return UserError(f"{path} isn't what a run wrote ({name}={shown}); restore it or leave the run out")


def _columns(lines: list[dict[str, Any]], clock: WorkClock) -> Columns:
    """Lines of one kind by column: the axes, then every number that one of the lines has."""
    names = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, int | float))
    for line in lines:
        wrong = next((name for name in names if not isinstance(line.get(name, 0), int | float | None)), None)
        if wrong is not None:
            raise ValueError(f"{wrong}={line[wrong]!r} at step {line['step']}")
    columns: Columns = {axis: [line[axis] for line in lines] for axis in _AXES if axis != "hours"}
    columns["hours"] = [clock.at(line["time"]) for line in lines]
    return columns | {name: [line.get(name) for line in lines] for name in names if name not in _NOT_CURVES}


def _given(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
