"""Stochastic depth whose noise is keyed by sample.

A mask drawn from a process's own generator depends on how the batch was split over processes. Here the training loop
draws the uniforms of each sample from (seed, epoch, sample) and hands them to the model, so that a sample meets the
same masks on any number of processes. Without handed noise a model draws from torch's generator, as others do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.models.errors import ModelError, check_rates


class DropPath(nn.Module):
    """Drops a residual branch for whole samples and divides the kept ones by 1 - rate.

    One mask value per sample: with x of shape (B, T, N, C) all blocks of an image are dropped together. In evaluation,
    and with rate 0, it returns its input. `noise` and `index` are set by `set_drop_path_noise`.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.index = 0
        self.noise: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...), same dtype."""
        if not self.training or self.rate == 0.0:
            return x
        if self.noise is None:
            uniform = torch.rand(len(x), device=x.device)
        elif len(self.noise) == len(x):
            uniform = self.noise[:, self.index]
        else:
            raise ModelError(f"drop-path noise is set for {len(self.noise)} samples, the batch has {len(x)}")
        # At least float32: 1 / (1 - rate) rounded to bfloat16 would be wrong by up to 0.4 % for every sample alike.
        scale = (uniform >= self.rate).to(torch.promote_types(x.dtype, torch.float32)) / (1.0 - self.rate)
        return (x * scale.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}"


def drop_path_rates(maximum: float, depth: int) -> list[float]:
    """linspace(0, maximum, depth): the rate of each layer from first to last; a single layer has rate 0.

    Raises:
        ModelError: the maximum is outside [0, 1).
    """
    check_rates(drop_path_rate=maximum)
    return [maximum * i / max(depth - 1, 1) for i in range(depth)]


def _drop_paths(model: nn.Module) -> list[DropPath]:
    # modules() walks in the order of construction, which in every model here is the order of the forward pass.
    return [m for m in model.modules() if isinstance(m, DropPath)]


def num_drop_paths(model: nn.Module) -> int:
    """How many uniforms per sample `set_drop_path_noise` takes: one per residual branch, those of rate 0 included."""
    return len(_drop_paths(model))


def set_drop_path_noise(model: nn.Module, noise: Tensor | None) -> None:
    """Decide the drop-path masks of the next forward pass.

    The i-th DropPath in forward order keeps sample b if and only if `noise[b, i] >= rate`. The noise stays until it is
    replaced. With activation checkpointing replace it only after the backward pass, which recomputes the layers.

    Args:
        model: the model, or a wrapper of it (DDP, FSDP, torch.compile).
        noise: (B, num_drop_paths(model)) uniforms in [0, 1) on the model's device; None: draw from torch's generator.

    Raises:
        ModelError: the noise has another number of columns.
    """
    modules = _drop_paths(model)
    if noise is not None and (noise.ndim != 2 or noise.shape[1] != len(modules)):
        raise ModelError(f"drop-path noise has shape {tuple(noise.shape)}, the model needs (batch, {len(modules)})")
    for index, module in enumerate(modules):
        module.index, module.noise = index, noise
