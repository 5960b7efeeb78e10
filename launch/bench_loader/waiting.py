"""How long a training waits for a loader that is just as fast as it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

from launch.bench_loader.contender import Settings
from launch.bench_loader.ours import endless

# Batches of a block, in multiples of what is prepared ahead. In long ones a shared machine changes its pace.
_BLOCK = 10


def waiting(settings: Settings, blocks: int) -> dict[str, dict[str, float]]:
    """Parts of the time of a training whose step takes as long as the loader does for a batch.

    Blocks of batches taken as fast as they come, which say how long that is, and blocks with such steps take turns. A
    step is slept, as on the host of a GPU. No batch is ready when a block begins, as at the start of a training; how
    long that shows is not counted: the first steps, as many as batches are prepared ahead.

    Args:
        blocks: with steps.

    Returns:
        Median and quartiles over the blocks. `wait_share`: the training waits for a batch. `added_share`: the
        part of that which is not because the loader itself, in the blocks before and after, was slower than the step.
    """
    batches = endless(settings)
    drained = settings.prefetch * max(settings.workers, 1)
    _take(batches, settings.warmup + drained)
    count = _BLOCK * drained
    shares: dict[str, list[float]] = {"wait_share": [], "added_share": []}
    pace = _take(batches, count) / count
    for _ in range(blocks):
        _steps(batches, pace, drained)
        start = time.perf_counter()
        slept = _steps(batches, pace, count)
        took = time.perf_counter() - start
        _take(batches, drained)
        after = _take(batches, count) / count
        shares["wait_share"].append(1 - slept / took)
        shares["added_share"].append(1 - max(slept, count * (pace + after) / 2) / took)
        pace = after
    return {name: _quartiles(found) for name, found in shares.items()}


def _steps(batches: Iterator[Any], seconds: float, count: int) -> float:
    """Train on so many batches; returns the seconds that the steps really took."""
    slept = 0.0
    for _ in range(count):
        began = time.perf_counter()
        time.sleep(seconds)
        slept += time.perf_counter() - began
        next(batches)
    return slept


def _quartiles(values: list[float]) -> dict[str, float]:
    return dict(zip(("lower_quartile", "median", "upper_quartile"), statistics.quantiles(values, n=4), strict=True))


def _take(batches: Iterator[Any], count: int) -> float:
    """Seconds that so many batches take."""
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - start
