"""One training step: mix, forward and backward per micro-batch, update."""

from __future__ import annotations

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


def train_step(
    engine: Engine, batch: TrainBatch, lr: float, accumulate: int, objective: Objective, device: torch.device
) -> StepResult:
    """Train on this process's part of a global step; nothing here waits for the device.

    Args:
        accumulate: micro-batches; gradients are averaged over them.
    """
    images = batch.images.to(device, non_blocking=True)
    labels = batch.labels.to(device, non_blocking=True)
    noise = batch.drop_path.to(device, non_blocking=True)
    mix = batch.mix.to(device)
    tokens = None if batch.tokens is None else batch.tokens.to(device)
    images, classes = apply_mix(images, labels, mix, objective.num_classes)
    loss_sum = torch.zeros((), device=device)
    part_sums: dict[str, torch.Tensor] = {}
    size = len(images) // accumulate
    for i in range(accumulate):
        part = slice(i * size, (i + 1) * size)
        with nullcontext() if i == accumulate - 1 else engine.accumulating():
            set_drop_path_noise(engine.plain, noise[part])
            its_tokens = None if tokens is None else tokens.rows(part)
            with engine.autocast():
                output = forward(engine.model, images[part], objective.request(its_tokens))
            targets = objective.targets(classes[part], its_tokens, mix.rows(part))
            loss, parts = objective.loss(output, targets)
            engine.backward(loss / accumulate)
        loss_sum += (loss / accumulate).detach()
        for name, value in parts.items():
            part_sums[name] = part_sums.get(name, 0) + value.detach() / accumulate
    norm, skipped = engine.step(lr)
    return StepResult(loss_sum, norm, skipped, part_sums)
