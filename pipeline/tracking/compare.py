"""Runs side by side: which config keys differ and what came of it, as table columns, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pipeline.tracking.files import encode_floats
from pipeline.tracking.runs import RunSummary

MISSING = "-"
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 12
# They name the run directory, and the file that it was made from, and so always differ.
_PLACE_KEYS = {"name", "out", "tracking.recipe"}
_NOT_IN_CSV = {"config", "curve"}


@dataclass(frozen=True)
class Column:
    """One column of the table: a title and one text per run."""

    title: str
    cells: list[str]
    numeric: bool = True


def differing_keys(runs: Sequence[RunSummary]) -> list[str]:
    """Config keys that don't have the same value in all runs that have a config, in the order of the configs."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in keys
        if key not in _PLACE_KEYS and any(config.get(key) != configs[0].get(key) for config in configs)
    ]


def short_titles(keys: Sequence[str]) -> list[str]:
    """Dotted keys without the leading parts that aren't needed to tell them apart."""
    titles = []
    for key in keys:
        parts = key.split(".")
        for length in range(1, len(parts) + 1):
            title = ".".join(parts[-length:])
            if sum(other == title or other.endswith(f".{title}") for other in keys) == 1:
                break
        titles.append(title)
    return titles


def table_columns(runs: Sequence[RunSummary]) -> list[Column]:
    """The comparison as columns of text; the first one names the runs."""
    keys = differing_keys(runs)
    scale = [top1 for run in runs for _, top1 in run.curve]
    low, high = min(scale, default=0.0), max(scale, default=0.0)

    def column(title: str, cell: Callable[[RunSummary], str | None], numeric: bool = True) -> Column:
        return Column(title, [cell(run) or MISSING for run in runs], numeric)

    return [
        Column("run", run_labels(runs), numeric=False),
        *(
            column(title, lambda run, key=key: _text(run.config.get(key)), numeric=False)  # type: ignore[misc]
            for key, title in zip(keys, short_titles(keys), strict=True)
        ),
        column("params", lambda run: _count(run.params)),
        column("epochs", lambda run: _progress(run.epoch, run.total_epochs)),
        column("steps", lambda run: _progress(run.step, run.total_steps)),
        column("top-1 %", lambda run: _percent(run.final_top1)),
        column("best %", lambda run: _percent(run.best_top1)),
        column("at step", lambda run: _text(run.best_step)),
        column("eval curve", lambda run: sparkline([top1 for _, top1 in run.curve], low, high), numeric=False),
        column("train loss", lambda run: _number(run.train_loss, ".4f")),
        column("img/s", lambda run: _number(run.images_per_second, ".1f")),
        column("hours", lambda run: _number(run.wall_hours, ".2f")),
        column("state", lambda run: run.state + ("" if run.step is not None else ", no metrics yet"), numeric=False),
    ]


def run_labels(runs: Sequence[RunSummary]) -> list[str]:
    """Directory names, or whole paths where two names are the same."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]


def sparkline(values: Sequence[float], low: float, high: float, width: int = _CURVE_WIDTH) -> str:
    """A curve of at most `width` characters between `low` and `high`; longer ones are sampled, the last value kept."""
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    span = high - low
    levels = [(value - low) / span if span > 0 else 1.0 for value in values]
    return "".join(_BARS[round(level * (len(_BARS) - 1))] for level in levels)


def to_json(runs: Sequence[RunSummary]) -> str:
    """`{"differing": [keys], "runs": [...]}`: all fields of `RunSummary`, of the config the differing keys."""
    keys = differing_keys(runs)
    records = [
        {name: getattr(run, name) for name in _field_names(set())}
        | {"path": str(run.path), "config": {key: run.config.get(key) for key in keys}}
        for run in runs
    ]
    return json.dumps(encode_floats({"differing": keys, "runs": records}), indent=2, default=str)


def to_csv(runs: Sequence[RunSummary]) -> str:
    """One line per run: the fields of `RunSummary` and the differing config keys under their full names."""
    keys = differing_keys(runs)
    names = _field_names(_NOT_IN_CSV)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *keys])
    for run in runs:
        writer.writerow([*(getattr(run, name) for name in names), *(run.config.get(key) for key in keys)])
    return out.getvalue()


def _field_names(without: set[str]) -> list[str]:
    return [field.name for field in fields(RunSummary) if field.name not in without]


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value) if isinstance(value, bool | list | dict) else str(value)


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _percent(fraction: float | None) -> str | None:
    return None if fraction is None else f"{100 * fraction:.2f}"


def _progress(done: float | None, total: float | None) -> str | None:
    if done is None:
        return None
    return f"{_round(done)}/{_round(total)}" if total is not None else _round(done)


def _round(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.1f}".removesuffix(".0")


def _count(value: int | None) -> str | None:
    if value is None:
        return None
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return str(value)
