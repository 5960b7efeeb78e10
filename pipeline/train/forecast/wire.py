"""Bytes that a process sends in a step."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.train.forecast.states import States


def count_wire(config: RunConfig, first: States, params: int, world_size: int) -> int:
    """Bytes that each process sends, and receives, in a step, by ring algorithms.

    A gather or a scatter of n bytes over W processes sends n (W-1)/W, an average of n bytes twice that. `fsdp` also
    sends the padding that makes all parts of a parameter equal.

    Args:
        first: what rank 0 keeps; with `fsdp` its part of the gradients is as large as any.
        params: parameters of the model.
    """
    times = config.train.accumulate
    if config.engine.name == "fsdp":
        whole, passes = first.gradients * world_size, 2 * times + 1
    else:
        stage = config.engine.zero_stage if config.engine.name == "deepspeed" else 0
        whole, passes = params * 4, {0: 2, 1: 3, 2: times + 1, 3: 3 * times}[stage]
    return round(passes * whole * (world_size - 1) / world_size)
