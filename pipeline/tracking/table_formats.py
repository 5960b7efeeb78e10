"""The comparison for other programs: CSV, JSON, LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from pipeline.tracking import metric_names
from pipeline.tracking.compare import cost, count, run_labels, short_titles, text
from pipeline.tracking.files import encode_floats
from pipeline.tracking.groups import (
    SeedGroup,
    Spread,
    best_group,
    compare_groups,
    differing_keys,
    group_runs,
)
from pipeline.tracking.record import RunSummary

_NOT_IN_CSV = {"config", "curve", "evals", "train"}
_NOT_IN_JSON = {"config", "train"}
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def to_json(runs: Sequence[RunSummary], metric: str, price: float | None, left_out: Sequence[str] = ()) -> str:
    """`{"differing": [keys], "runs": [...], "groups": [...], "tests": [...]}` and more.

    A run has all fields of `RunSummary` but the training lines, and of the config the differing keys. A group names its
    runs by index; a test (`groups.Comparison`) names its groups by index.
    """
    keys = differing_keys(runs)
    groups = group_runs(runs, metric)
    best = best_group(groups, metric)
    records = [
        {name: getattr(run, name) for name in _field_names(_NOT_IN_JSON)}
        | {"path": str(run.path), "cost": cost(run, price), "config": {key: run.config.get(key) for key in keys}}
        for run in runs
    ]
    whole = {
        "metric": metric,
        "differing": keys,
        "runs": records,
        "groups": [group_record(group, runs) for group in groups],
        "tests": [] if best is None else [asdict(test) for test in compare_groups(groups, best)],
        "left_out": list(left_out),
    }
    return json.dumps(encode_floats(whole), indent=2, default=str) + "\n"


def group_record(group: SeedGroup, runs: Sequence[RunSummary]) -> dict[str, Any]:
    """A group in plain values; its runs as indices."""
    places = {id(run): i for i, run in enumerate(runs)}
    return {
        "settings": group.settings,
        "runs": [places[id(run)] for run in group.members],
        "complete": [places[id(run)] for run in group.counted],
        "repeats": [places[id(run)] for run, _ in group.repeats],
        "n": len(group.values),
        "values": group.values,
        "final": None if group.final is None else asdict(group.final),
        "best": None if group.best is None else asdict(group.best),
    }


def to_csv(runs: Sequence[RunSummary], metric: str, price: float | None) -> str:
    """One line per run: the fields of `RunSummary` and the differing config keys under their full names."""
    keys = differing_keys(runs)
    names = _field_names(_NOT_IN_CSV)
    more = [] if metric == "top1" else [f"final_{metric}", f"best_{metric}"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *more, *(["cost"] if price is not None else []), *keys])
    for run in runs:
        figures = [run.final(metric), run.best(metric)] if more else []
        writer.writerow(
            [
                *(getattr(run, name) for name in names),
                *figures,
                *([cost(run, price)] if price is not None else []),
                *(run.config.get(key) for key in keys),
            ]
        )
    return out.getvalue()


def to_latex(runs: Sequence[RunSummary], metric: str, price: float | None) -> str:
    """A table for a paper (it needs the package booktabs): a row per setting, mean and deviation over its seeds.

    The best mean is bold. Settings without a run that came to its end have dashes.
    """
    groups = group_runs(runs, metric)
    keys = list(groups[0].settings)
    labels = dict(zip(map(id, runs), run_labels(runs), strict=True))
    finals = [group.final.mean for group in groups if group.final]
    top = (min if metric_names.lower_is_better(metric) else max)(finals, default=None)
    seeds = any(len(group.values) > 1 for group in groups)
    names = [] if keys else ["run"]
    money = [] if price is None else ["cost"]
    unit = metric_names.title(metric)
    head = [*names, *short_titles(keys), "params", "GMACs", unit, *(["n"] if seeds else []), "img/s", "GPU-h", *money]
    lines = [
        r"\begin{tabular}{" + "l" * len(names + keys) + "r" * (len(head) - len(names + keys)) + "}",
        r"\toprule",
        " & ".join(map(latex, head)) + r" \\",
        r"\midrule",
    ]
    for group in groups:
        first = group.members[0]
        costs = [cost(run, price) for run in group.counted]
        cells = [
            *([latex(labels[id(first)])] if names else []),
            *(latex(text(group.settings[key]) or "--") for key in keys),
            latex(count(first.params) or "--"),
            "--" if first.macs is None else f"{first.macs / 1e9:.2f}",
            _latex_spread(group.final, metric, bold=group.final is not None and group.final.mean == top),
            *([str(len(group.values))] if seeds else []),
            _mean([run.images_per_second for run in group.counted], ".0f"),
            _mean([run.gpu_hours for run in group.counted], ".1f"),
            *([_mean(costs, ".2f")] if money else []),
        ]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def latex(words: str) -> str:
    """Text with LaTeX's own characters escaped."""
    return "".join(_LATEX.get(character, character) for character in words)


def _latex_spread(values: Spread | None, metric: str, bold: bool) -> str:
    if values is None:
        return "--"
    mean = metric_names.written(metric, values.mean)
    deviation = "" if values.sd is None else rf" \pm {metric_names.written(metric, values.sd)}"
    return rf"$\mathbf{{{mean}}}{deviation}$" if bold else f"${mean}{deviation}$"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if known else "--"


def _field_names(without: set[str]) -> list[str]:
    return [field.name for field in fields(RunSummary) if field.name not in without]
