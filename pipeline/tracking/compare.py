"""Runs side by side in the terminal: which config keys differ and what came of it, as table columns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.tracking import metric_names
from pipeline.tracking.groups import SeedGroup, Spread, best_group, compare_groups, differing_keys
from pipeline.tracking.record import RunSummary

MISSING = "-"
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 12


@dataclass(frozen=True)
class Column:
    """One column of the table: a title and one text per run."""

    title: str
    cells: list[str]
    numeric: bool = True


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


def table_columns(runs: Sequence[RunSummary], metric: str = "top1", price: float | None = None) -> list[Column]:
    """The comparison as columns of text; the first one names the runs. Memory, GPU-hours and cost only where known.

    Args:
        metric: what evaluations measured.
        price: of a GPU-hour, in any currency.
    """
    keys = differing_keys(runs)
    curves = [[value for value in run.evals.get(metric, []) if value is not None] for run in runs]
    values = [value for curve in curves for value in curve if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    title = metric_names.title(metric)

    def column(title: str, cell: Callable[[RunSummary], str | None], numeric: bool = True) -> Column:
        return Column(title, [cell(run) or MISSING for run in runs], numeric)

    columns = [
        Column("run", run_labels(runs), numeric=False),
        *(
            column(title, lambda run, key=key: text(run.config.get(key)), numeric=False)  # type: ignore[misc]
            for key, title in zip(keys, short_titles(keys), strict=True)
        ),
        column("params", lambda run: count(run.params)),
        column("epochs", lambda run: _progress(run.epoch, run.total_epochs)),
        column("steps", lambda run: _progress(run.step, run.total_steps)),
        column(title, lambda run: metric_names.written(metric, run.final(metric))),
        column("best" + title[title.rfind(" ") :] if "%" in title else "best", lambda run: _best(run, metric)),
        *([column("at step", lambda run: text(run.best_step))] if metric == "top1" else []),
        Column("eval curve", [sparkline(curve, low, high) or MISSING for curve in curves], numeric=False),
        column("train loss", lambda run: _number(run.train_loss, ".4f")),
        column("img/s", lambda run: _number(run.images_per_second, ".1f")),
        column("mem GB", lambda run: _number(run.memory_gb, ".2f")),
        column("hours", lambda run: _number(run.wall_hours, ".2f")),
        column("GPU-h", lambda run: _number(run.gpu_hours, ".2f")),
        column("cost", lambda run: _number(cost(run, price), ".2f")),
        column("state", lambda run: run.state + ("" if run.step is not None else ", no metrics yet"), numeric=False),
    ]
    optional = {"mem GB", "GPU-h", "cost"}
    return [column for column in columns if column.title not in optional or set(column.cells) != {MISSING}]


def group_columns(groups: Sequence[SeedGroup], metric: str) -> list[Column]:
    """Settings that were run with several seeds: mean and standard deviation, and Welch's test against the best."""
    best = best_group(groups, metric)
    tests = {} if best is None else {test.group: test for test in compare_groups(groups, best)}
    titles = short_titles(list(groups[0].settings))
    scale, digits = metric_names.scale(metric), metric_names.digits(metric)
    columns = [
        Column(title, [text(group.settings[key]) or MISSING for group in groups], numeric=False)
        for key, title in zip(groups[0].settings, titles, strict=True)
    ]
    differences, ps = [], []
    for i in range(len(groups)):
        test = tests.get(i)
        if test is None:
            differences.append("best" if i == best else MISSING)
            ps.append(MISSING)
        else:
            low, high = (f"{scale * value:+.{digits}f}" for value in (test.low, test.high))
            differences.append(f"{scale * test.difference:+.{digits}f} [{low}, {high}]")
            ps.append(p_text(test.p_holm))
    return [
        Column("runs", [few([run.name for run in group.members]) for group in groups], numeric=False),
        *columns,
        Column("n", [str(group.final.n if group.final else 0) for group in groups]),
        Column(metric_names.title(metric), [spread_text(group.final, metric) for group in groups]),
        Column("best", [spread_text(group.best, metric) for group in groups]),
        *([Column("to the best [95 %]", differences), Column("p", ps)] if tests else []),
    ]


def repeats(groups: Sequence[SeedGroup], runs: Sequence[RunSummary]) -> list[str]:
    """One line for each group in which runs don't count because a newer one has their seed."""
    labels = dict(zip(map(id, runs), run_labels(runs), strict=True))
    return [_repeats(group, labels) for group in groups if group.repeats]


def _repeats(group: SeedGroup, labels: Mapping[int, str]) -> str:
    others: dict[str, list[str]] = {}
    for run, newest in group.repeats:
        others.setdefault(f"seed {newest.config['seed']} as {labels[id(newest)]}", []).append(labels[id(run)])
    told = "; ".join(f"{', '.join(names)} (same {newest})" for newest, names in others.items())
    return f"left out of n: {told}; of runs with one seed and equal settings the newest counts"


def spread_text(values: Spread | None, metric: str) -> str:
    """`81.50 ± 0.12`; without the second part where there is one value."""
    if values is None:
        return MISSING
    mean = metric_names.written(metric, values.mean)
    return f"{mean}" + ("" if values.sd is None else f" ± {metric_names.written(metric, values.sd)}")


def p_text(p: float) -> str:
    """A p-value with two digits that say something."""
    return f"{p:.2g}" if p >= 0.001 else "<0.001"


def few(names: Sequence[str], limit: int = 3) -> str:
    """Some names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def cost(run: RunSummary, price: float | None) -> float | None:
    """GPU-hours times the price of one; None where either isn't known."""
    return None if price is None or run.gpu_hours is None else price * run.gpu_hours


def run_labels(runs: Sequence[RunSummary]) -> list[str]:
    """Directory names, or whole paths where two names are the same."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]


def sparkline(values: Sequence[float], low: float, high: float, width: int = _CURVE_WIDTH) -> str:
    """A curve of at most `width` characters between `low` and `high`; longer ones are sampled, the last value kept.

    What is no number, or infinite, is an x.
    """
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    span = high - low

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "x"
        level = (value - low) / span if span > 0 else 1.0
        return _BARS[round(level * (len(_BARS) - 1))]

    return "".join(map(bar, values))


def text(value: Any) -> str | None:
    """A config's value as it would be written in a recipe."""
    return None if value is None else json.dumps(value) if isinstance(value, bool | list | dict) else str(value)


def count(value: int | None) -> str | None:
    """`17.1M`, `438.4k`."""
    if value is None:
        return None
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return str(value)


def _best(run: RunSummary, metric: str) -> str | None:
    return metric_names.written(metric, run.best(metric))


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _progress(done: float | None, total: float | None) -> str | None:
    if done is None:
        return None
    return f"{_round(done)}/{_round(total)}" if total is not None else _round(done)


def _round(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.1f}".removesuffix(".0")
