"""Comparing what was written with the model it came from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models import ImageModel

TOLERANCE = 1e-4


class CheckFailed(UserError):
    """What was written computes something else than the model."""


def images(model: ImageModel, batch: int, seed: int = 0) -> Tensor:
    """Normal noise of the model's input shape, the same on every machine."""
    generator = torch.Generator().manual_seed(seed + batch)
    return torch.randn(batch, model.in_chans, model.img_size, model.img_size, generator=generator)


def difference(got: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference over the largest absolute value wanted."""
    largest = wanted.abs().max().item()
    return (got - wanted).abs().max().item() / (largest or 1.0)


@torch.no_grad()
def compare(model: ImageModel, run: Callable[[Tensor], Tensor], batches: tuple[int, ...], what: str) -> float:
    """Run both on the same images.

    Args:
        model: the model, set to evaluate.
        run: images (B, C, H, W) -> logits of what was written.
        batches: sizes of the batches.
        what: name of what was written, for the message.

    Returns:
        The largest `difference` of a batch.

    Raises:
        CheckFailed: it is above 1e-4, or not a number.
    """
    worst = 0.0
    for batch in batches:
        x = images(model, batch)
        wanted, got = model(x), run(x)
        if got.shape != wanted.shape:
            raise CheckFailed(f"{what} returns {tuple(got.shape)} where the model returns {tuple(wanted.shape)}")
        found = difference(got, wanted)
        if not found <= TOLERANCE:  # true of NaN as well
            raise CheckFailed(
                f"{what} differs from the model by {found:.2e} of the largest logit (batch of {batch}); "
                f"{TOLERANCE:.0e} is allowed, so nothing is written"
            )
        worst = max(worst, found)
    return worst
