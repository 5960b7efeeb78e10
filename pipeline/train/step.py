"""One training step: mix, forward and backward per micro-batch, update."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from pipeline.data.augment.mixing import apply_mix, soft_target_cross_entropy
from pipeline.data.loader import TrainBatch
from pipeline.hashing import seed64
from pipeline.models import set_drop_path_noise
from pipeline.train.engines import Engine

_STEP_STREAM = 102


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make torch's generators a function of the step, so that a resumed run needs no saved generator state."""
    torch.manual_seed(seed64(seed, _STEP_STREAM, step, rank))


def train_step(
    engine: Engine, batch: TrainBatch, lr: float, accumulate: int, num_classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Train on this process's part of a global step; nothing here waits for the device.

    Args:
        accumulate: micro-batches; gradients are averaged over them.

    Returns:
        Mean loss of this process, gradient norm, and 1.0 if the update was skipped; 0-D tensors.
    """
    images = batch.images.to(device, non_blocking=True)
    labels = batch.labels.to(device, non_blocking=True)
    noise = batch.drop_path.to(device, non_blocking=True)
    images, targets = apply_mix(images, labels, batch.mix.to(device), num_classes)
    loss_sum = torch.zeros((), device=device)
    micro_batches = list(zip(images.chunk(accumulate), targets.chunk(accumulate), noise.chunk(accumulate), strict=True))
    for i, (x, y, u) in enumerate(micro_batches):
        with nullcontext() if i == accumulate - 1 else engine.accumulating():
            set_drop_path_noise(engine.plain, u)
            with engine.autocast():
                logits = engine.model(x)
            loss = soft_target_cross_entropy(logits, y) / accumulate
            engine.backward(loss)
        loss_sum += loss.detach()
    norm, skipped = engine.step(lr)
    return loss_sum, norm, skipped
