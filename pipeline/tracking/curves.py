"""Curves by samples and by epoch, for a server whose charts have whole steps on their axis and nothing else.

Every evaluation gives a point `by_samples/eval/<name>`. What is logged every few steps gives one point an epoch, the
mean of its lines: `by_epoch/train/<name>` and `by_samples/train/<name>`. `by_epoch/` has one evaluation of each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import floor, isfinite
from typing import Any, NamedTuple

# Counts since the start of the run: their mean says nothing.
_COUNTS = ("skipped", "bad_samples")
_POSITION = ("kind", "step", "samples", "epoch", "time")
# An epoch is computed as step / steps_per_epoch.
_ROUNDING = 1e-9


class Point(NamedTuple):
    """One value of one metric, as MLflow stores it."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class CurveState:
    """What was read of the epoch that isn't over; plain values, so it can be saved as JSON.

    Attributes:
        epochs: per kind of line, the newest whole epoch that gave points.
        sums: per name of "train", the sum and the number of the finite values since that epoch.
    """

    epochs: dict[str, int] = field(default_factory=dict)
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)


def curve_points(line: dict[str, Any], state: CurveState) -> tuple[list[Point], CurveState]:
    """Points of the curves that a line of "train" or "eval" completes, and the state after it.

    An epoch ends with the first line at or after its end; that line counts for the epoch that ends.
    """
    kind = line["kind"]
    if kind not in ("train", "eval"):
        return [], state
    values = {k: float(v) for k, v in line.items() if k not in _POSITION and isinstance(v, int | float)}
    epoch = floor(line["epoch"] + _ROUNDING)
    is_over = epoch > state.epochs.get(kind, 0)
    sums = dict(state.sums)
    if kind == "train":
        for name, value in values.items():
            if name not in _COUNTS and isfinite(value):
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + value, count + 1)
        values = {name: total / count for name, (total, count) in sums.items()} if is_over else {}
        sums = {} if is_over else sums
    axes = {"by_samples": line["samples"], **({"by_epoch": epoch} if is_over else {})}
    time_ms = int(line["time"] * 1000)
    points = [Point(f"{axis}/{kind}/{k}", v, time_ms, at) for axis, at in axes.items() for k, v in values.items()]
    return points, CurveState({**state.epochs, **({kind: epoch} if is_over else {})}, sums)
