"""Evaluation that counts every sample exactly once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.data.loader import EvalBatch
from pipeline.tracking.confusion import Confusion
from pipeline.train.distributed import World
from pipeline.train.predictions import Answers


def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    autocast: AbstractContextManager[None],
    world: World,
    answers: Answers | None = None,
) -> tuple[dict[str, float], Confusion]:
    """Top-1, top-5 and mean cross-entropy over the split, and what was taken for what; collective.

    All processes run the same number of equal batches; the padding that makes them equal carries weight 0. Counts are
    summed as integers, so top-1 and top-5 do not depend on how the samples were spread.

    Args:
        answers: gets what was answered to each sample.

    Returns:
        `top1`, `top5` as fractions, `loss`, and `count`, the samples counted; and their confusion matrix.
    """
    pairs = _Pairs()
    counts, losses = _tally(model, ((batch, None) for batch in batches), 1, autocast, world, pairs, answers)
    return _figures(counts, losses), pairs.read(world)


def evaluate_parts(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    parts: Sequence[torch.Tensor],
    autocast: AbstractContextManager[None],
    world: World,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """`evaluate`, over the whole split and over each of its two parts, in one pass; collective.

    Args:
        parts: for every batch (b,) int64, 0 or 1: the part that each sample belongs to.

    Returns:
        Figures of the whole split, and those of the parts.

    Raises:
        ZeroDivisionError: a part has no sample.
    """
    counts, losses = _tally(model, zip(batches, parts, strict=True), 2, autocast, world)
    return _figures(counts.sum(1), losses.sum()), [_figures(counts[:, i], losses[i]) for i in range(2)]


class _Pairs:
    """Label and prediction of every sample as one number; the device is asked once, at the end.

    All processes' numbers are gathered: 8 bytes a sample, where a summed matrix takes 8 for every pair of classes.
    """

    def __init__(self) -> None:
        self._classes = 1
        self._cells: list[torch.Tensor] = []

    def add(self, labels: torch.Tensor, predicted: torch.Tensor, real: torch.Tensor, classes: int) -> None:
        """One batch, (b,) each; padding becomes -1."""
        self._classes = classes
        self._cells.append(torch.where(real, labels * classes + predicted, -1))

    def read(self, world: World) -> Confusion:
        """Collective."""
        own = torch.cat(self._cells).cpu().numpy() if self._cells else np.zeros(0, np.int64)
        return Confusion.of(self._classes, world.gather(own[own >= 0]))


@torch.no_grad()
def _tally(
    model: nn.Module,
    batches: Iterable[tuple[EvalBatch, torch.Tensor | None]],
    parts: int,
    autocast: AbstractContextManager[None],
    world: World,
    pairs: _Pairs | None = None,
    answers: Answers | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-1 hits, top-5 hits and samples (3, parts) int64, and summed losses (parts,) float64, over all processes."""
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, parts, dtype=torch.int64, device=world.device)
    losses = torch.zeros(parts, dtype=torch.float64, device=world.device)
    for batch, part in batches:
        images = batch.images.to(world.device, non_blocking=True)
        labels = batch.labels.to(world.device, non_blocking=True)
        real = batch.real.to(world.device, non_blocking=True)
        into = torch.zeros_like(labels) if part is None else part.to(world.device, non_blocking=True)
        with autocast:
            logits = model(images)
        logits = logits.float()
        nearest = logits.topk(min(5, logits.shape[1]), dim=1).indices
        if pairs is not None:
            pairs.add(labels, nearest[:, 0], real, logits.shape[1])
        if answers is not None:
            answers.add(labels, nearest[:, 0], logits)
        top = nearest == labels[:, None]
        hits = torch.stack([top[:, 0] & real, top.any(dim=1) & real, real])
        counts.index_add_(1, into, hits.long())
        losses.index_add_(0, into, F.cross_entropy(logits, labels, reduction="none").double() * real)
    model.train(was_training)
    return world.sum(counts), world.sum(losses)


def _figures(counts: torch.Tensor, loss_sum: torch.Tensor) -> dict[str, float]:
    top1, top5, count = counts.flatten().tolist()
    return {"top1": top1 / count, "top5": top5 / count, "loss": loss_sum.item() / count, "count": count}
