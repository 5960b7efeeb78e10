"""Small NesTs that learn within seconds what GradCAT is then asked about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.explain.gradcat import check_tree
from pipeline.models import create_model
from pipeline.models.nest import Nest

Batch = tuple[Tensor, Tensor]
# Images of 16 px, blocks of 2x2 tokens of 2x2 px: 16 leaves of 4x4 px.
SMALL: dict[str, Any] = {"img_size": 16, "in_chans": 1, "patch_size": 2, "num_levels": 3, "drop_path_rate": 0.0}


def trained(batches: Iterator[Batch], steps: int, lr: float, smoothing: float = 0.0, **overrides: Any) -> Nest:
    """A NesT after so many steps of AdamW with a linearly falling learning rate."""
    torch.manual_seed(0)
    model = check_tree(create_model("nest_micro", **SMALL | overrides)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    for _ in range(steps):
        images, labels = next(batches)
        loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def marks(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise in which one of the 16 leaves holds the mark of one of four classes: which half of it is bright.

    Returns:
        (count, 1, 16, 16) images, (count,) classes, and (count, 2) row and column of the leaf.
    """
    images = 0.5 * torch.randn(count, 1, 16, 16, generator=generator)
    labels = torch.randint(0, 4, (count,), generator=generator)
    blocks = torch.randint(0, 4, (count, 2), generator=generator)
    halves = torch.tensor([2.0, 2.0, -2.0, -2.0])[:, None].expand(4, 4)
    patterns = [halves, -halves, halves.T, -halves.T]
    for image, label, (row, column) in zip(images, labels.tolist(), blocks.tolist(), strict=True):
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = patterns[label]
    return images, labels, blocks


def mark_batches(seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield marks(32, generator)[:2]


def digits() -> tuple[Batch, Batch]:
    """scikit-learn's digits at 16 px in -1 ... 1: 1,437 to train on and 360 others."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = F.interpolate(torch.tensor(data.images / 8 - 1).float()[:, None], size=16, mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(data.target)[order]
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def digit_batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(0, len(images), (64,), generator=generator)
        yield images[chosen], labels[chosen]
