"""How long each of Refiner's kernels takes on a GPU: what `bench/instructions.py` counts, measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from pipeline.models.refine_calls import Calls
from pipeline.models.refine_maps import OfficialRefiner

Launch = tuple[str, torch.cuda.Event, torch.cuda.Event]


def refine_kernels(samples: int, groups: int, heads: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Microseconds a sample of every kernel in a training step of one refiner in bf16: median, least and most.

    Args:
        samples: of a batch.
        groups: of BatchNorm statistics that they come in.
        heads, tokens: maps are (samples, heads, tokens, tokens).
    """
    torch.manual_seed(0)
    refiner = OfficialRefiner(heads, 3, 3, 1.0).cuda().train()
    refiner.fused = True
    for norm in refiner.norms():
        norm.group = samples // groups
    maps = torch.randn(samples, heads, tokens, tokens, device="cuda").softmax(-1).to(torch.bfloat16)
    found: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        torch.cuda._sleep(20_000_000)  # some 10 ms of work ahead: events would measure how Python launches, too
        with launches() as made:
            leaf = maps.clone().requires_grad_()
            refiner(leaf).sum().backward()
        torch.cuda.synchronize()
        of_step: dict[str, float] = {}
        for name, start, end in made:
            of_step[name] = of_step.get(name, 0.0) + start.elapsed_time(end)
        if repeat:  # the first one compiles
            for name, milliseconds in of_step.items():
                found.setdefault(name, []).append(1000 * milliseconds / samples)
    return [
        {"kernel": name, "median": median(times), "min": min(times), "max": max(times)} for name, times in found.items()
    ]


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Every launch meanwhile: name of the kernel, and events before and after it."""
    made: list[Launch] = []
    launch = Calls.launch

    def timed(self: Calls, function: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch(self, function, grid, *arguments, **constants)
        end.record()
        way = ", measured" if constants.get("SUM") else ""
        made.append((function.fn.__name__.removesuffix("_kernel") + way, start, end))

    Calls.launch = timed  # type: ignore[method-assign]
    try:
        yield made
    finally:
        Calls.launch = launch  # type: ignore[method-assign]
