"""Reads run directories, finished or not: state, config, figures. Writes nothing."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.tracking.files import read_json, read_lines
from pipeline.tracking.metrics import METRICS_NAME, read_metrics
from pipeline.tracking.run_dir import (
    CONFIG_NAME,
    FACTS_NAME,
    RESULT_NAME,
    SESSIONS_NAME,
    EndStatus,
    RunDir,
    is_locked,
)
from pipeline.trees import flatten

RunState = EndStatus | Literal["running", "killed", "unknown"]
_MARKERS = (CONFIG_NAME, SESSIONS_NAME, METRICS_NAME)
_SEARCH_DEPTH = 3


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
        images_per_second: median over the training lines.
        wall_hours: time in which a process worked on it, over all sessions.
        curve: (step, top-1) of every evaluation.
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


def is_run(path: Path) -> bool:
    """Whether a directory is a run directory."""
    return path.is_dir() and any((path / name).exists() for name in _MARKERS)


def find_runs(paths: list[Path]) -> list[Path]:
    """Run directories among `paths` and in the folders among them (three levels deep), each once, in order.

    Raises:
        UserError: a path is neither a run directory nor a folder with some.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} doesn't exist; name a run directory (runs/<name>) or a folder of them")
        runs = _search(path, _SEARCH_DEPTH)
        if not runs:
            raise UserError(
                f"{path} is no run directory ({', '.join(_MARKERS)} are missing), and there are none in it; "
                "name one (runs/<name>) or a folder of them"
            )
        found += runs
    return list(dict.fromkeys(found))


def _search(path: Path, depth: int) -> list[Path]:
    if is_run(path):
        return [path]
    if depth == 0 or not path.is_dir():
        return []
    return [run for child in sorted(path.iterdir()) for run in _search(child, depth - 1)]


def run_state(path: Path) -> RunState:
    """What became of a run, from its lock and its last session."""
    if is_locked(path):
        return "running"
    sessions = read_lines(path / SESSIONS_NAME)
    if sessions:
        return sessions[-1]["status"] if sessions[-1]["event"] == "end" else "killed"
    return "finished" if (path / RESULT_NAME).exists() else "unknown"


def summarize(path: Path) -> RunSummary:
    """Read one run directory.

    Raises:
        UserError: one of its files is damaged.
    """
    lines = read_metrics(path)
    facts = read_json(path / FACTS_NAME) or {}
    result = read_json(path / RESULT_NAME) or {}
    measured = [line for line in lines if line["kind"] in ("train", "eval")]
    train = [line for line in lines if line["kind"] == "train"]
    curve = [(line["step"], line["top1"]) for line in lines if line["kind"] == "eval" and "top1" in line]
    best = result.get("best") or {}
    if not best and curve:
        step, top1 = max(curve, key=lambda point: point[1])
        best = {"top1": top1, "step": step}
    speeds = [line["images_per_second"] for line in train if "images_per_second" in line]
    losses = [line["loss"] for line in train if "loss" in line]
    return RunSummary(
        name=path.resolve().name,
        path=path,
        state=run_state(path),
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
        wall_hours=_wall_hours(path, lines, result),
        curve=curve,
    )


def _wall_hours(path: Path, lines: list[dict[str, Any]], result: dict[str, Any]) -> float | None:
    """Hours between the start of each session and its end or last sign of life."""
    sessions = read_lines(path / SESSIONS_NAME)
    starts = [entry["time"] for entry in sessions if entry["event"] == "start"]
    if not starts:
        seconds = result.get("wall_seconds")
        return None if seconds is None else seconds / 3600
    # A rewind takes lines away, but its event says when the last of them was written.
    alive = [line["time"] for line in lines] + [line["last_time"] for line in lines if "last_time" in line]
    alive += [entry["time"] for entry in sessions]
    total = 0.0
    for start, following in zip(starts, [*starts[1:], float("inf")], strict=True):
        total += max(time for time in alive if start <= time < following) - start
    return total / 3600
