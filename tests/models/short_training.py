"""A few steps of training on one batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def losses_of(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, dtype: torch.dtype | None = None
) -> list[float]:
    """The loss of each step; with `dtype`, by autocast to it."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
