"""What the page knows: runs, curves, groups, published figures, as plain values for its script."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.tracking import metric_names
from pipeline.tracking.compare import cost, few, repeats, run_labels, short_titles
from pipeline.tracking.groups import COMPLETE, best_group, compare_groups, differing_keys, group_runs
from pipeline.tracking.published import published_points, speeds_source
from pipeline.tracking.record import FLOPS_PER_MAC, Columns, RunSummary, metrics_of
from pipeline.tracking.table_formats import group_record

# Points of a curve that the page keeps: more than a screen has pixels for them.
MAX_POINTS = 600
_DIGITS = 8
# With more settings than this, tests are made against the best one only.
_MAX_REFERENCES = 20
_FIGURES = (
    "state",
    "dataset",
    "params",
    "macs",
    "step",
    "total_steps",
    "epoch",
    "total_epochs",
    "samples",
    "train_flops",
    "train_loss",
    "images_per_second",
    "memory_gb",
    "wall_hours",
    "processes",
    "gpu_hours",
)
# Of the training lines, those that tell runs apart; a run's other figures are in its metrics.jsonl.
_TRAIN_CURVES = ("loss", "lr", "grad_norm", "images_per_second", "memory_gb", "data_wait")
_AXES = ("step", "samples", "epoch", "hours")


def page_data(runs: Sequence[RunSummary], metric: str, price: float | None, left_out: Sequence[str]) -> dict[str, Any]:
    """Everything on the page, as JSON's types only; figures that are not finite are None."""
    keys = differing_keys(runs)
    groups = group_runs(runs, metric)
    best = best_group(groups, metric)
    references = range(len(groups)) if len(groups) <= _MAX_REFERENCES else [] if best is None else [best]
    content = {
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "metric": metric,
        "metrics": {name: _metric(name) for name in metrics_of(runs)},
        "keys": _titles(keys),
        "runs": [_run(run, label, keys, price) for run, label in zip(runs, run_labels(runs), strict=True)],
        "groups": [group_record(group, runs) for group in groups],
        "groupKeys": _titles(list(groups[0].settings)),
        "reference": best,
        "tests": {str(i): [asdict(test) for test in compare_groups(groups, i)] for i in references},
        "published": published_points({run.dataset for run in runs if run.dataset}) if metric == "top1" else [],
        "speeds": speeds_source(),
        "price": price,
        "flopsPerMac": FLOPS_PER_MAC,
        "leftOut": list(left_out),
        "notes": notes(runs) + [f"{line[0].upper()}{line[1:]}." for line in repeats(groups, runs)],
    }
    return _plain(content)


def notes(runs: Sequence[RunSummary]) -> list[str]:
    """What a reader must know before comparing these runs."""
    found = []
    data = {run.fingerprint: run.dataset for run in runs if run.fingerprint}
    if len(data) > 1:
        names = ", ".join(sorted({name for name in data.values() if name}))
        found.append(f"These runs have {len(data)} different sets of data ({names}); figures compare only within one.")
    silent = [run.name for run in runs if run.step is None]
    if silent:
        found.append(f"Nothing measured yet: {few(silent)}.")
    open_ends = Counter(run.state for run in runs if run.state not in COMPLETE)
    if open_ends:
        states = ", ".join(f"{number} {state}" for state, number in open_ends.items())
        found.append(f"Not at their planned end ({states}) and so left out of the statistics over seeds.")
    return found


def thin(columns: Columns, key: str, limit: int = MAX_POINTS) -> Columns:
    """At most `limit` lines of the columns, so that the curve of `key` looks the same.

    Of every stretch of the curve its lowest and its highest point stay, and the first and last of all.
    """
    total = len(columns["step"])
    if total <= limit:
        return columns
    values = [math.inf if value is None else value for value in columns.get(key, columns["step"])]
    stretches = (limit - 2) // 2
    kept = {0, total - 1}
    for i in range(stretches):
        stretch = range(i * total // stretches, (i + 1) * total // stretches)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return {name: [column[i] for i in sorted(kept)] for name, column in columns.items()}


def _titles(keys: Sequence[str]) -> list[dict[str, str]]:
    """Short names of config keys; a bare `name` says nothing without its section."""
    shorts = short_titles(keys)
    return [
        {"key": key, "title": key.split(".")[-2] if short == "name" and "." in key else short}
        for key, short in zip(keys, shorts, strict=True)
    ]


def _metric(name: str) -> dict[str, Any]:
    return {
        "title": metric_names.title(name),
        "scale": metric_names.scale(name),
        "digits": metric_names.digits(name),
        "lower": metric_names.lower_is_better(name),
    }


def _run(run: RunSummary, label: str, keys: Sequence[str], price: float | None) -> dict[str, Any]:
    measured = [name for name in run.evals if name not in _AXES]
    train = {name: run.train[name] for name in (*_AXES, *_TRAIN_CURVES) if name in run.train}
    return {
        "label": label,
        "path": str(run.path),
        **{name: getattr(run, name) for name in _FIGURES},
        "cost": cost(run, price),
        "final": {name: run.final(name) for name in measured} | {"top1": run.final_top1},
        "best": {name: run.best(name) for name in measured} | {"top1": run.best_top1},
        "config": {key: run.config.get(key) for key in keys},
        "evals": thin(run.evals, measured[0] if measured else "step"),
        "train": thin(train, "loss"),
    }


def _plain(value: Any) -> Any:
    """Values that JSON has, numbers shortened to the digits that anybody reads."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | None) else str(value)
