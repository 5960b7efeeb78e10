"""A residual sum and the LayerNorm of it in one pass: for half precision, whose residual sums are in float32.

Under autocast PyTorch's LayerNorm writes float32, which is read and written once more to be rounded for the product
that follows. Backward it reads its input and the gradient twice, once for what all tokens share, and the gradients of
both users of the sum are added in passes of their own. The kernels here read and write each tensor once, forward and
backward, and add up the gradients of LayerNorm's weight and bias, and of the bias of the branch, on the way; see
`sum_norm_kernel`.

It is opt-in (the models' `kernels="triton"`): it rounds otherwise than PyTorch's, so a run has it or not from its
first step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.kernels import FREE_LAYOUT, computed_in, launching, triton_module


def sum_norm(
    x: Tensor,
    norm: nn.LayerNorm,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    times: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """x + scale · times · (branch + bias), and its LayerNorm: (..., C) -> (..., C) both, with gradients.

    Args:
        x: (B, ..., C).
        norm: over C.
        branch: like x; None: nothing is added.
        bias: (C,), of the branch's last layer; None: it is in the branch.
        scale: (B,) a factor for each sample, without a gradient; None: 1.

    Returns:
        The sum, and its LayerNorm in the type that products have.
    """
    rows, added = _rows(x), None if branch is None else _rows(branch)
    shared = norm.weight, norm.bias, norm.eps, computed_in(x)
    total, normed = _SumNorm.apply(rows, added, bias, scale, times, *shared)
    return total.view(x.shape), normed.view(x.shape)


def add_branch(x: Tensor, branch: Tensor, bias: Tensor | None, scale: Tensor | None, times: float = 1.0) -> Tensor:
    """`sum_norm` without a LayerNorm."""
    return _SumNorm.apply(_rows(x), _rows(branch), bias, scale, times, None, None, 0.0, x.dtype)[0].view(x.shape)


def _rows(x: Tensor) -> Tensor:
    """(..., C) -> (T, C). A compiler takes tensors of four dimensions for images, and would transpose them."""
    return x.contiguous().view(-1, x.shape[-1])


class _SumNorm(torch.autograd.Function):
    """The sum is one of its results, so that its gradient and that of the LayerNorm are added where both are known."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        times: float,
        weight: Tensor | None,
        shift: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        found, normed = torch.ops.rookery.sum_norm(x, branch, bias, scale, times, weight, shift, eps, dtype)
        total = x if branch is None else found
        ctx.save_for_backward(scale, weight, None if weight is None else total)
        ctx.times, ctx.eps, ctx.biased = times, eps, bias is not None
        ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, bias, weight, shift)]
        return total, None if weight is None else normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_normed: Tensor | None) -> Any:
        scale, weight, total = ctx.saved_tensors
        of_x, of_branch, of_bias, of_weight, of_shift = ctx.dtypes
        grad_x, grad_branch, sums = torch.ops.rookery.sum_norm_backward(
            grad_total, grad_normed, total, scale, ctx.times, weight, ctx.eps, of_x, of_branch, ctx.biased
        )
        return (
            grad_total.to(of_x) if weight is None else grad_x,
            None if of_branch is None else grad_branch,
            None if of_bias is None else sums[0].to(of_bias),
            None,
            None,
            None if weight is None else sums[1].to(of_weight),
            None if weight is None else sums[2].to(of_shift),
            None,
            None,
        )


@torch.library.custom_op("rookery::sum_norm", mutates_args=(), tags=FREE_LAYOUT)
def _forward(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    times: float,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out = _results(x, branch, weight, dtype)
    with launching(x):
        added = None if branch is None else branch.contiguous()
        triton_module("sum_norm_kernel").forward(x.contiguous(), added, bias, scale, times, weight, shift, eps, *out)
    return out


def _results(x: Tensor, branch: Tensor | None, weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0) if branch is None else x.new_empty(x.shape, dtype=_promoted(x, branch))
    return total, x.new_empty(0) if weight is None else x.new_empty(x.shape, dtype=dtype)


def _promoted(x: Tensor, branch: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, branch.dtype)


@_forward.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    times: float,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _results(x, branch, weight, dtype)


@torch.library.custom_op("rookery::sum_norm_backward", mutates_args=(), tags=FREE_LAYOUT)
def _backward(
    grad_total: Tensor,
    grad_normed: Tensor | None,
    total: Tensor | None,
    scale: Tensor | None,
    times: float,
    weight: Tensor | None,
    eps: float,
    of_x: torch.dtype,
    of_branch: torch.dtype | None,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_branch, _ = _gradients(grad_total, weight, of_x, of_branch)
    with launching(grad_total):
        rows = [None if t is None else t.contiguous() for t in (grad_total, grad_normed, total)]
        there, out = (of_branch is not None, biased), (grad_x, grad_branch)
        sums = triton_module("sum_norm_kernel").backward(*rows, *there, scale, times, weight, eps, *out)
    return grad_x, grad_branch, sums


def _gradients(
    grad_total: Tensor, weight: Tensor | None, of_x: torch.dtype, of_branch: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = grad_total.new_empty(0 if weight is None else grad_total.shape, dtype=of_x)
    grad_branch = grad_total.new_empty(0 if of_branch is None else grad_total.shape, dtype=of_branch)
    kind = torch.promote_types(grad_total.dtype, torch.float32)
    return grad_x, grad_branch, grad_total.new_empty(1 if weight is None else 3, grad_total.shape[-1], dtype=kind)


@_backward.register_fake
def _(
    grad_total: Tensor,
    grad_normed: Tensor | None,
    total: Tensor | None,
    scale: Tensor | None,
    times: float,
    weight: Tensor | None,
    eps: float,
    of_x: torch.dtype,
    of_branch: torch.dtype | None,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(grad_total, weight, of_x, of_branch)
