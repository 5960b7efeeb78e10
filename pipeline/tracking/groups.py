"""Runs that differ only in their seed, taken together: mean, spread, and whether two settings differ."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.tracking.metric_names import lower_is_better
from pipeline.tracking.record import RunSummary

# They name the run directory, and the file that it was made from.
_PLACES = {"name", "out", "tracking.recipe"}
# They name the run, or say where and how its record is kept; its results don't depend on them.
_PLACE_KEYS = {"name", "out", "resume", "data.workers", "data.prefetch", "data.resident"}
_DATA_KEYS = {"data.train", "data.val"}
_PLACE_SECTIONS = ("data.cache", "explain.", "profile.", "checkpoint.", "tracking.")
COMPLETE = {"finished", "stopped"}


@dataclass(frozen=True)
class Spread:
    """Values of several seeds.

    Attributes:
        mean: their mean.
        sd: sample standard deviation (divided by n - 1); None with one value.
        n: how many.
    """

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class SeedGroup:
    """Runs with the same settings.

    Attributes:
        settings: the config keys in which groups differ, with this group's values.
        members: all of its runs.
        counted: those that came to their planned end, of each seed the newest; only they count.
        repeats: the others that came to their end, each with the counted run of its seed.
        values: final figures of the counted runs.
        final, best: of the same runs; None when there is none.
    """

    settings: dict[str, Any]
    members: list[RunSummary]
    counted: list[RunSummary]
    repeats: list[tuple[RunSummary, RunSummary]]
    values: list[float]
    final: Spread | None
    best: Spread | None


@dataclass(frozen=True)
class Comparison:
    """Welch's t-test between two groups.

    Attributes:
        group, reference: indices of the groups.
        difference: mean of the group minus mean of the reference.
        low, high: 95 % confidence interval of the difference.
        p: probability of a difference this large (in either direction) if the true means are equal.
        p_holm: the same after Holm's correction for the number of groups compared with the reference.
    """

    group: int
    reference: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float


def differing_keys(runs: Sequence[RunSummary], without: Callable[[str], bool] | None = None) -> list[str]:
    """Config keys that don't have the same value in all runs that have a config, in the order of the configs.

    Args:
        without: keys to leave out; by default `_PLACES`, which always differ.
    """
    skip = without or _PLACES.__contains__
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config if not skip(key))
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]


def group_runs(runs: Sequence[RunSummary], metric: str) -> list[SeedGroup]:
    """Put runs together whose configs are equal but for the seed, in the order of their first runs.

    Keys that name a run or its places are not compared; of data the contents are, where they are known, not the
    folders. A run without a config is a group of its own.
    """
    groups: dict[str, list[RunSummary]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(_identity(run) if run.config else str(i), []).append(run)
    same_data = len({run.fingerprint for run in runs}) == 1 and runs[0].fingerprint is not None
    keys = differing_keys(runs, lambda key: _is_seed_or_place(key) or (same_data and key in _DATA_KEYS))
    return [
        _seed_group({key: members[0].config.get(key) for key in keys}, members, metric) for members in groups.values()
    ]


def best_group(groups: Sequence[SeedGroup], metric: str) -> int | None:
    """Index of the group with the best mean of those with at least two complete runs; None without one."""
    sign = -1 if lower_is_better(metric) else 1
    rated = [(sign * group.final.mean, -i) for i, group in enumerate(groups) if group.final and group.final.n > 1]
    return -max(rated)[1] if rated else None


def compare_groups(groups: Sequence[SeedGroup], reference: int) -> list[Comparison]:
    """Every other group against one, where both have at least two complete runs and one of them has a spread."""
    tests = {
        i: found
        for i, group in enumerate(groups)
        if i != reference and (found := welch(group.values, groups[reference].values)) is not None
    }
    adjusted = holm([p for *_, p in tests.values()])
    return [
        Comparison(i, reference, difference, low, high, p, p_holm)
        for (i, (difference, low, high, p)), p_holm in zip(tests.items(), adjusted, strict=True)
    ]


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float, float] | None:
    """Difference of the means, its 95 % confidence interval and the two-sided p of Welch's t-test.

    None where it isn't defined: fewer than two values on a side, or no spread on either.
    """
    from scipy.special import stdtr, stdtrit

    if len(a) < 2 or len(b) < 2:
        return None
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if not va + vb > 0:
        return None
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    difference, error = statistics.fmean(a) - statistics.fmean(b), math.sqrt(va + vb)
    margin = float(stdtrit(freedom, 0.975)) * error
    p = 2 * float(stdtr(freedom, -abs(difference) / error))
    return difference, difference - margin, difference + margin, p


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of one family of tests after Holm's step-down correction."""
    adjusted = [0.0] * len(ps)
    worst = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = worst
    return adjusted


def spread(values: Sequence[float]) -> Spread | None:
    """Mean, standard deviation and number of some values; None of none."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _seed_group(settings: dict[str, Any], members: list[RunSummary], metric: str) -> SeedGroup:
    complete = [run for run in members if run.state in COMPLETE]
    seeds = [_seed(run) for run in complete]
    newest: dict[str, RunSummary] = {}
    for run, seed in zip(complete, seeds, strict=True):
        if seed not in newest or (run.ended or 0) > (newest[seed].ended or 0):
            newest[seed] = run
    pairs = [(run, newest[seed]) for run, seed in zip(complete, seeds, strict=True)]
    counted = [run for run, chosen in pairs if run is chosen]
    final, best = (
        [value for value in figures if value is not None and math.isfinite(value)]
        for figures in ([run.final(metric) for run in counted], [run.best(metric) for run in counted])
    )
    repeats = [(run, chosen) for run, chosen in pairs if run is not chosen]
    return SeedGroup(settings, members, counted, repeats, final, spread(final), spread(best))


def _seed(run: RunSummary) -> str:
    """What tells a run from another with its settings.

    A run without a seed is its own: rookery writes one into every config, so nobody knows whether these were the same.
    """
    seed = run.config.get("seed")
    return str(run.path) if seed is None else f"seed {seed}"


def _identity(run: RunSummary) -> str:
    named = _DATA_KEYS if run.fingerprint is not None else set()
    settings = {key: value for key, value in run.config.items() if not _is_seed_or_place(key) and key not in named}
    return json.dumps([run.fingerprint, settings], sort_keys=True, default=str)


def _is_seed_or_place(key: str) -> bool:
    if key == "checkpoint.compact":  # rounds what the run goes on from
        return False
    return key == "seed" or key in _PLACE_KEYS or key.startswith(_PLACE_SECTIONS)
