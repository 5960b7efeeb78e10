"""The search space: which values a trial gets."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from launch.sweep.config import Axis, SweepConfig
from pipeline.config import TrackingConfig
from pipeline.hashing import hash64
from pipeline.tracking.redact import redact

Values = dict[str, Any]
RECIPE = "recipe"
# Folder of the run directories, in that of the sweep.
TRIALS = "trials"

_DIGITS = 4


class Chooser(Protocol):
    """Answers what a key is to be."""

    def option(self, key: str, count: int) -> int:
        """Index of one of several options."""

    def number(self, key: str, low: float, high: float, log: bool) -> float:
        """A number from low to high."""

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number from low to high, both included."""


class Hashed:
    """Draws that are a function of integers and the key, so that trial 7 is trial 7 in every start of the sweep."""

    def __init__(self, *keys: int) -> None:
        self._keys = keys

    def uniform(self, key: str) -> float:
        """A number in [0, 1)."""
        return float(hash64(*self._keys, zlib.crc32(key.encode())) >> 11) * 2**-53

    def option(self, key: str, count: int) -> int:
        return int(self.uniform(key) * count)

    def number(self, key: str, low: float, high: float, log: bool) -> float:
        if log:
            return math.exp(self.number(key, math.log(low), math.log(high), False))
        return low + (high - low) * self.uniform(key)

    def integer(self, key: str, low: int, high: int) -> int:
        return low + self.option(key, high - low + 1)


def axes(config: SweepConfig) -> dict[str, Axis]:
    """The keys that vary, several recipes among them, in order."""
    recipes = config.recipe
    return ({RECIPE: Axis(grid=list(recipes))} if isinstance(recipes, list) else {}) | config.space


def grid_points(space: Mapping[str, Axis]) -> list[Values]:
    """Every combination of the grids, the last one changing fastest; one empty point without grids."""
    points: list[Values] = [{}]
    for key, axis in space.items():
        if axis.grid:
            points = list(_with(points, key, axis))
    return points


def _with(points: list[Values], key: str, axis: Axis) -> Iterator[Values]:
    for point in points:
        if not is_active(axis, point):
            yield point
            continue
        for value in axis.grid or []:
            yield point | {key: value}


def is_active(axis: Axis, values: Values) -> bool:
    """Whether a key varies beside these values of the keys above it."""
    return all(
        key in values and values[key] in (wanted if isinstance(wanted, list) else [wanted])
        for key, wanted in axis.when.items()
    )


def draw(space: Mapping[str, Axis], chooser: Chooser, fixed: Values) -> Values:
    """The values of a trial: those of `fixed`, and the chooser's for all other keys that are active."""
    values: Values = {}
    for key, axis in space.items():
        if not is_active(axis, values):
            continue
        values[key] = fixed[key] if key in fixed else choose(key, axis, chooser)
    return values


def choose(key: str, axis: Axis, chooser: Chooser) -> Any:
    """One value of an axis. Numbers have four digits, so that they can be read and typed."""
    if axis.options is not None:
        return axis.options[chooser.option(key, len(axis.options))]
    if axis.randint is not None:
        return chooser.integer(key, *axis.randint)
    low, high = axis.uniform or axis.loguniform or (0.0, 1.0)
    number = chooser.number(key, low, high, axis.loguniform is not None)
    return min(max(float(f"{number:.{_DIGITS}g}"), low), high)


def drawn_trials(config: SweepConfig) -> list[Values]:
    """The values of every trial of a searcher that doesn't wait for results."""
    space = axes(config)
    points = grid_points(space)
    count = config.trials or len(points)
    return [draw(space, Hashed(config.searcher.seed, i), points[i % len(points)]) for i in range(count)]


def as_overrides(values: Values) -> list[str]:
    """`key=value` as on the command line."""
    return [f"{key}={_as_yaml(value)}" for key, value in values.items() if key != RECIPE]


def arguments_of(config: SweepConfig, name: str, values: Values) -> list[str]:
    """Arguments of `rookery train` for a trial: its recipe and all overrides."""
    place = [f"out={config.folder / TRIALS}", f"name={name}"]
    if "sweep" in TrackingConfig.model_fields:
        place.append(f"tracking.sweep={config.name}")
    return [str(values.get(RECIPE, config.recipe)), *config.overrides, *as_overrides(values), *place]


def hidden(values: Values) -> Values:
    """Values as they may be written down: without credentials."""
    return dict(redact(values))


def revealed(config: SweepConfig, values: Values) -> Values:
    """What `hidden` was given: credentials only stand in options, which the sweep has."""
    space = axes(config)
    return {key: _revealed(space[key], key, value) if key in space else value for key, value in values.items()}


def _revealed(axis: Axis, key: str, value: Any) -> Any:
    options = axis.options or []
    if value in options:
        return value
    return next((option for option in options if redact({key: option}) == {key: value}), value)


def _as_yaml(value: Any) -> str:
    if isinstance(value, str):
        return value if value and yaml.safe_load(value) == value else json.dumps(value)
    return json.dumps(value)


def shown(values: Values) -> str:
    """Values for a reader: the last word of each key, no credentials, and no paths to recipes."""
    values = hidden(values)
    named = {RECIPE: Path(str(values[RECIPE])).stem} if RECIPE in values else {}
    return " ".join(f"{key.rpartition('.')[2]}={_as_yaml(value)}" for key, value in (values | named).items())
