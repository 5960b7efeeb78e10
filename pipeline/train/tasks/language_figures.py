"""What an evaluation of sentences measures, from the answers of all samples; by scikit-learn and SciPy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.text.batches import TextBatch
from pipeline.data.text.glue import TextTask
from pipeline.tracking.confusion import Confusion
from pipeline.train.distributed import World


def losses(logits: Tensor, labels: Tensor, task: TextTask) -> Tensor:
    """(b, K) float32 and (b,) -> (b,): cross-entropy of classes, squared error of numbers."""
    if task.classes:
        return F.cross_entropy(logits, labels, reduction="none")
    return (logits[:, 0] - labels).square()


class TextAnswers(NamedTuple):
    """What was answered to each sample of a split, in its order: (n,) float64 each.

    Attributes:
        answers, labels: classes, or numbers.
        losses: meaningless where there are no labels.
        probabilities: of the classes that were answered; NaN for numbers.
    """

    answers: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    probabilities: np.ndarray


def evaluate_text(
    model: nn.Module,
    batches: Iterable[TextBatch],
    task: TextTask,
    autocast: AbstractContextManager[None],
    world: World,
) -> tuple[dict[str, float], Confusion | None]:
    """Figures of the split, every sample counted once; collective.

    Returns:
        The figure that judges first, others of the task, `loss` and `count`; and the confusion matrix of classes.
    """
    return judge(answer_text(model, batches, task, autocast, world), task)


@torch.no_grad()
def answer_text(
    model: nn.Module,
    batches: Iterable[TextBatch],
    task: TextTask,
    autocast: AbstractContextManager[None],
    world: World,
) -> TextAnswers:
    """The answer to every sample, once; collective.

    The answers of all processes are brought into the order of the samples before anything is summed, so that the
    figures don't depend on who computed what.
    """
    was_training = model.training
    model.eval()
    found: list[np.ndarray] = []
    for batch in batches:
        on_device = batch.to(world.device)
        with autocast:
            logits = model(on_device.ids, on_device.types, on_device.tokens)
        logits = logits.float()
        answers = logits.argmax(1) if task.classes else logits[:, 0]
        loss = losses(logits, on_device.labels, task)
        sure = logits.softmax(1).amax(1) if task.classes else torch.full_like(answers, torch.nan)
        columns = (batch.samples, *(t.double().cpu() for t in (answers, on_device.labels, loss, sure)))
        found.append(torch.stack([column.double() for column in columns], 1)[batch.real].numpy())
    model.train(was_training)
    rows = np.concatenate(world.gather(np.concatenate([np.zeros((0, 5)), *found])))
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return TextAnswers(*rows[:, 1:].T)


def judge(answers: TextAnswers, task: TextTask) -> tuple[dict[str, float], Confusion | None]:
    """Figures and confusion matrix as `evaluate_text` returns them."""
    labels, count = answers.labels, len(answers.labels)
    figures = _figures(answers.answers, labels, task) | {"loss": float(answers.losses.mean()), "count": count}
    if not task.classes:
        return figures, None
    cells = (labels * len(task.classes) + answers.answers).astype(np.int64)
    return figures, Confusion.of(len(task.classes), [cells])


def _figures(answers: np.ndarray, labels: np.ndarray, task: TextTask) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # answers that are all the same have no correlation: NaN, or 0 for Matthews
        if task.figure == "spearman":
            from scipy.stats import pearsonr, spearmanr

            return {
                "spearman": float(spearmanr(answers, labels).statistic),
                "pearson": float(pearsonr(answers, labels).statistic),
            }
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        accuracy = {"accuracy": float(accuracy_score(labels, answers))}
        if task.figure == "f1":
            return {"f1": float(f1_score(labels, answers))} | accuracy
        if task.figure == "matthews":
            return {"matthews": float(matthews_corrcoef(labels, answers))} | accuracy
        return accuracy
