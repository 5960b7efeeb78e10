"""Loss spikes: back to the checkpoint before one, and past the samples that led to it."""

from __future__ import annotations

import logging
from dataclasses import replace
from statistics import median

from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.distributed import World
from pipeline.train.engines import Engine
from pipeline.train.state import State

log = logging.getLogger("rookery")

# Windows of the log that a loss is compared with, and how many there must be.
WINDOWS, _FEWEST = 20, 5


def is_spike(loss: float, before: list[float], factor: float | None) -> bool:
    """Whether a window's mean loss is more than `factor` times the median of those before it.

    A NaN is none: such steps are skipped by themselves.
    """
    return factor is not None and len(before) >= _FEWEST and loss > factor * median(before)


def roll_back(engine: Engine, store: CheckpointStore, state: State, window: int, limit: int, world: World) -> State:
    """Load the newest checkpoint before the last `window` steps, and go on where the data are; collective.

    No sample of the steps between is used again: their number stays, their updates are gone.

    Args:
        engine: gets weights, optimizer and average of that checkpoint.
        state: after the spike.
        window: steps over which the loss was taken.
        limit: how often a run may roll back.

    Returns:
        The state to go on with; the same one, after a warning, when there is no such checkpoint.

    Raises:
        UserError: the limit is reached.
    """
    if len(state.rollbacks) >= limit:
        world.fail(
            f"the loss spiked again in step {state.step}, after {limit} roll-backs (train.max_rollbacks); lower "
            "optim.lr, lengthen optim.schedule.warmup or set train.clip_grad_norm, and begin a new run (name=...)"
        )
    checkpoint = world.on_main(lambda: store.newest(state.step - window))
    if checkpoint is None:
        if world.is_main:
            log.warning(
                "the loss spiked in step %d, but there is no checkpoint before it; training goes on", state.step
            )
        return state
    engine.load(checkpoint.path)
    before = State(**checkpoint.progress())
    return replace(state, losses=before.losses, rollbacks=[*state.rollbacks, (checkpoint.step, state.step)])
