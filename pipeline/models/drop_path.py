"""Stochastic depth whose noise is keyed by sample.

A mask drawn from a process's own generator depends on how the batch was split over processes. Here the training loop
draws the uniforms of each sample from (seed, epoch, sample) and hands them to the model, so that a sample meets the
same masks on any number of processes. Without handed noise a model draws from torch's generator, as others do.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.errors import ModelError, check_rates


class DropPath(nn.Module):
    """Drops a residual branch for whole samples and divides the kept ones by 1 - rate.

    One mask value per sample: with x of shape (B, T, N, C) all blocks of an image are dropped together. In evaluation,
    and with rate 0, it returns its input.

    Attributes:
        rate: which part of the samples is dropped, on average.
        scale: (B,) what the next pass multiplies each sample by, from `set_drop_path_noise`; None: it draws.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self._drops = rate > 0.0  # what a compiler may look at: the rate itself would make every layer another one
        self.scale: Tensor | None = None

    def forward(self, x: Tensor, onto: Tensor | None = None, times: float = 1.0) -> Tensor:
        """(B, ...) -> (B, ...).

        Args:
            x: the branch.
            onto: the residual sum that it is added to; None: it is given back alone, in its own dtype.
            times: a factor of the branch.
        """
        if not self.training or not self._drops:
            branch = x if times == 1.0 else x * times
            return branch if onto is None else onto + branch
        scale = self._scale_of(x).view(-1, *[1] * (x.ndim - 1))
        scale = scale if times == 1.0 else scale * times
        if onto is None:
            return (x * scale).to(x.dtype)
        if torch.compiler.is_compiling():  # fuses by itself
            return torch.addcmul(onto, x, scale).to(torch.promote_types(onto.dtype, x.dtype))
        return _ScaledSum.apply(onto, x, scale)

    def factors(self, x: Tensor) -> Tensor | None:
        """(B,) what a branch of the samples of `x`, (B, ...), is multiplied by; None: 1 for all."""
        return self._scale_of(x) if self.training and self._drops else None

    def _scale_of(self, x: Tensor) -> Tensor:
        # At least float32: 1 / (1 - rate) rounded to bfloat16 would be wrong by up to 0.4 % for every sample alike.
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.scale is None:
            return (torch.rand(len(x), device=x.device) >= self.rate).to(dtype) / (1.0 - self.rate)
        if len(self.scale) != len(x):
            raise ModelError(f"drop-path noise is set for {len(self.scale)} samples, the batch has {len(x)}")
        return self.scale.to(dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}"


class _ScaledSum(torch.autograd.Function):
    """onto + scale · branch, each read and written once: autograd's own way stores, rounds and reads the product.

    Scales have no gradient, and there are no second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, onto: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtypes = onto.dtype, branch.dtype
        out = torch.empty_like(onto, dtype=torch.promote_types(*ctx.dtypes))
        return torch.addcmul(onto, branch, scale, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        onto, branch = ctx.dtypes
        return grad.to(onto), torch.mul(grad, scale, out=torch.empty_like(grad, dtype=branch)), None


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
    # All branches at once, and what is left to a layer has no constant of its own: one compiled layer serves all that
    # are alike.
    scales = repeat(None) if noise is None or not modules else _scales(model, modules, noise)
    for module, scale in zip(modules, scales, strict=False):
        module.scale = scale


def _scales(model: nn.Module, modules: list[DropPath], noise: Tensor) -> Tensor:
    """(P, B): 0 where a branch drops a sample, else 1 / (1 - rate)."""
    like = next(model.parameters(), torch.empty(0, dtype=torch.float64))
    key = (tuple(module.rate for module in modules), noise.device, torch.promote_types(like.dtype, torch.float32))
    # Kept with the model: to bring them to a GPU in every step would wait for it.
    known = modules[0].__dict__.get("rates")
    if known is None or known[0] != key:
        rates, device, dtype = key
        kept = torch.tensor([1 - rate for rate in rates], dtype=dtype, device=device)
        known = (key, torch.tensor(rates, dtype=noise.dtype, device=device), kept)
        modules[0].__dict__["rates"] = known
    _, thresholds, kept = known
    return ((noise >= thresholds).to(kept.dtype) / kept).t().contiguous()
