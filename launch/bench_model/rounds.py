"""Models measured in turn, and the figures of their rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from launch.bench_model.contender import Contender
from launch.bench_model.count import Counts
from launch.bench_model.peaks import Peak
from launch.bench_model.runner import Phase, Runner

# Steps before the clock: of a model's first round, which compiles and finds its kernels, and of every later one.
_FIRST_STEPS, _LATER_STEPS = 2, 1


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        rounds: turns of every model.
        seconds: of a turn at least.
        precision: `fp32`, `bf16` or `fp16`.
        compiled: whether through torch.compile.
        device: to work on.
    """

    rounds: int
    seconds: float
    precision: str
    compiled: bool
    device: torch.device


@dataclass
class Found:
    """What the turns of one model gave.

    Attributes:
        batch: images of a step.
        rates: images per second of each turn.
        peak_bytes: see `Runner.peak_bytes`.
        failed: why it has no more of them; None if all went well.
        first_seconds: of the first step, with its compilation.
    """

    batch: int
    rates: list[float]
    peak_bytes: int | None = None
    failed: str | None = None
    first_seconds: float | None = None


def take_turns(
    batches: dict[Contender, int], phase: Phase, plan: Plan, told: Callable[[str], None]
) -> dict[str, Found]:
    """Measure models on batches of these sizes, the first turn of all, the second of all, ...

    A machine that gets slower or busier so hits everybody alike. All stay on the device; the batches of one whose turn
    is over don't.
    """
    runners: dict[str, tuple[Runner, int]] = {}
    found = {contender.name: Found(size, []) for contender, size in batches.items()}
    for contender, size in batches.items():
        told(f"{phase}: {contender.name} at a batch of {size}")
        try:
            runner = Runner(contender, phase, size, plan.precision, plan.compiled, plan.device)
            runner.draw()
            found[contender.name].first_seconds = runner.first()
            runner.timed(_FIRST_STEPS)
            found[contender.name].peak_bytes = runner.peak_bytes(2)
            one = runner.timed(2) / 2
            runners[contender.name] = runner, max(1, round(plan.seconds / one))
            runner.free()
        except Exception as error:
            found[contender.name].failed = _reason(error)
    for number in range(plan.rounds):
        told(f"{phase}: round {number + 1} of {plan.rounds}")
        for name, (runner, steps) in runners.items():
            row = found[name]
            if row.failed is not None:
                continue
            try:
                runner.draw()
                runner.timed(_LATER_STEPS)
                row.rates.append(steps * row.batch / runner.timed(steps))
                runner.free()
            except Exception as error:
                row.failed = _reason(error)
    return found


def _reason(error: Exception) -> str:
    # "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...": a table has room for the second sentence.
    sentences = str(error).split(". ")
    if isinstance(error, torch.OutOfMemoryError) and len(sentences) > 1:
        return f"out of memory: {sentences[1]}"
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def rows(
    found: dict[str, Found],
    counts: dict[str, Counts],
    phase: Phase,
    limits: Peak | None,
    peak: float | None,
    against: str | None,
) -> list[dict[str, Any]]:
    """One entry per model: median, minimum and maximum of its turns, ratios to `against`, share of the peak.

    A ratio is the median of the turns' ratios: both figures of one come from the same turn. FLOPs of a training step
    are three times those of the forward pass, so that recomputation earns nothing.

    Args:
        found, counts: of each model, by name.
        phase: `train` or `infer`.
        limits: of the GPU; None: the bound of a program without fusion is left out.
        peak: TFLOP/s; None: the share of the peak is left out.
        against: name of the model that the others are compared with.
    """
    table: list[dict[str, Any]] = []
    for name, one in found.items():
        counted = counts[name]
        flops = counted.flops * (3 if phase == "train" else 1)
        row: dict[str, Any] = {
            "name": name,
            "phase": phase,
            "batch": one.batch,
            "params": counted.params,
            "gflops_per_image": flops / 1e9,
            "unfused_megabytes_per_image": counted.bytes(phase) / 1e6,
        }
        if limits is not None:
            row["unfused_bound_images_per_second"] = counted.bound(phase, limits)
        table.append(row)
        if one.failed is not None:
            row["failed"] = one.failed
            continue
        row["first_step_seconds"] = one.first_seconds
        row["images_per_second"] = _spread(one.rates)
        row["peak_gb"] = None if one.peak_bytes is None else one.peak_bytes / 1e9
        row["mfu"] = None if peak is None else statistics.median(one.rates) * flops / (1e12 * peak)
        other = found.get(against or "")
        if other is not None and other.failed is None:
            row["times_faster"] = _spread([a / b for a, b in zip(one.rates, other.rates, strict=True)])
    return table


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
