"""One training step: forward and backward per micro-batch, update; and the step of a picture classifier."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

from pipeline.data.augment.mixing import apply_mix
from pipeline.data.loader import TrainBatch
from pipeline.hashing import seed64
from pipeline.models import set_drop_path_noise
from pipeline.train.engines import Engine
from pipeline.train.objective import Objective, forward

_STEP_STREAM = 102


class StepResult(NamedTuple):
    """What a step gave; 0-D tensors that may still be being computed.

    Attributes:
        loss: mean loss of this process.
        norm: gradient norm.
        skipped: 1.0 if the update was skipped.
        parts: terms of the loss before they are weighed, where it has several.
    """

    loss: torch.Tensor
    norm: torch.Tensor
    skipped: torch.Tensor
    parts: dict[str, torch.Tensor]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make torch's generators a function of the step, so that a resumed run needs no saved generator state."""
    torch.manual_seed(seed64(seed, _STEP_STREAM, step, rank))


def accumulated(
    engine: Engine, count: int, loss_of: Callable[[int], tuple[torch.Tensor, dict[str, torch.Tensor]]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward and backward of the micro-batches of a step; the engine's update is the caller's.

    Args:
        count: micro-batches; gradients are averaged over them.
        loss_of: mean loss of a micro-batch, and its parts.

    Returns:
        The mean loss and parts of this process, 0-D.
    """
    loss_sum = torch.zeros((), device=engine.world.device)
    part_sums: dict[str, torch.Tensor] = {}
    for i in range(count):
        with nullcontext() if i == count - 1 else engine.accumulating():
            loss, parts = loss_of(i)
            engine.backward(loss / count)
        loss_sum += (loss / count).detach()
        for name, value in parts.items():
            part_sums[name] = part_sums.get(name, 0) + value.detach() / count
    return loss_sum, part_sums


def train_step(
    engine: Engine, batch: TrainBatch, lr: float, accumulate: int, objective: Objective, device: torch.device
) -> StepResult:
    """Train on this process's pictures of a global step; nothing here waits for the device.

    Args:
        accumulate: micro-batches.
    """
    images = batch.images.to(device, non_blocking=True)
    labels = batch.labels.to(device, non_blocking=True)
    noise = batch.drop_path.to(device, non_blocking=True)
    mix = batch.mix.to(device)
    tokens = None if batch.tokens is None else batch.tokens.to(device)
    images, classes = apply_mix(images, labels, mix, objective.num_classes)
    size = len(images) // accumulate

    def loss_of(i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        part = slice(i * size, (i + 1) * size)
        set_drop_path_noise(engine.plain, noise[part])
        its_tokens = None if tokens is None else tokens.rows(part)
        with engine.autocast():
            output = forward(engine.model, images[part], objective.request(its_tokens))
        return objective.loss(output, objective.targets(classes[part], its_tokens, mix.rows(part)))

    loss, parts = accumulated(engine, accumulate, loss_of)
    norm, skipped = engine.step(lr)
    return StepResult(loss, norm, skipped, parts)
