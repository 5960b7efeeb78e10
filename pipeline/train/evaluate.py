"""Evaluation that counts every sample exactly once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.data.loader import EvalBatch
from pipeline.train.distributed import World


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[EvalBatch], autocast: AbstractContextManager[None], world: World
) -> dict[str, float]:
    """Top-1, top-5 and mean cross-entropy over the split; collective.

    All processes run the same number of equal batches; the padding that makes them equal carries weight 0. Counts are
    summed as integers, so top-1 and top-5 do not depend on how the samples were spread.

    Returns:
        `top1`, `top5` as fractions, `loss`, and `count`, the samples counted.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in batches:
        images = batch.images.to(world.device, non_blocking=True)
        labels = batch.labels.to(world.device, non_blocking=True)
        real = batch.real.to(world.device, non_blocking=True)
        with autocast:
            logits = model(images)
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        hits = torch.stack([top[:, 0] & real, top.any(dim=1) & real, real])
        counts += hits.sum(dim=1)
        loss_sum += (F.cross_entropy(logits, labels, reduction="none").double() * real).sum()
    model.train(was_training)
    world.sum(counts)
    world.sum(loss_sum)
    top1, top5, count = counts.tolist()
    return {"top1": top1 / count, "top5": top5 / count, "loss": loss_sum.item() / count, "count": count}
