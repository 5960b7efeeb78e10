"""An MLP whose GELU, and the gradient of it, are computed where the products beside them end: for half precision.

The hidden channels of an MLP are four times as many as its own, so that what passes over them counts most. PyTorch
reads and writes them for GELU, forward and backward, and reads them for the gradient of the bias; here the products
that make them do all this, see `mlp_kernel`. The other products are PyTorch's.

It is opt-in (the models' `kernels="triton"`): it rounds otherwise than PyTorch's, so a run has it or not from its
first step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.models.errors import ModelError
from pipeline.models.kernels import FREE_LAYOUT, computed_in, launching, triton_module


def check_fused_mlp(drop: float) -> None:
    """Raise ModelError unless the kernels can do it."""
    if drop:
        raise ModelError(f"kernels=triton has no dropout in MLPs: drop_rate={drop:g}, set it to 0")


def fused_mlp(
    x: Tensor, weight: Tensor, bias: Tensor, weight2: Tensor, bias2: Tensor | None, *, tanh: bool, lean: bool
) -> Tensor:
    """Linear, GELU, linear: (..., C) -> (..., C), with gradients, in the type that products have.

    Args:
        weight, bias: (F, C) and (F,) of the first layer.
        weight2, bias2: (C, F) and (C,) of the second; without a bias the caller adds it.
        tanh: GELU's form: by tanh, else by erf.
        lean: don't keep what comes out of GELU: the backward pass computes it again.
    """
    dtype = computed_in(x)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    keep, last = torch.is_grad_enabled(), None if bias2 is None else bias2.to(dtype)
    out = _FusedMlp.apply(rows, weight.to(dtype), bias, weight2.to(dtype), last, tanh, lean, keep)
    return out.view(x.shape)


class _FusedMlp(torch.autograd.Function):
    """The whole of it, since the gradient of GELU is the end of the product by the second layer's weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        weight2: Tensor,
        bias2: Tensor | None,
        tanh: bool,
        lean: bool,
        keep: bool,
    ) -> Tensor:
        after, before = torch.ops.rookery.mlp_hidden(x, weight, bias, tanh, keep)
        if keep:
            ctx.tanh, ctx.lean, ctx.bias = tanh, lean, bias.dtype
            ctx.save_for_backward(x, weight, weight2, before, *(() if lean else (after,)))
        return F.linear(after, weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, weight2, before, *kept = ctx.saved_tensors
        grad_before, sums, again = torch.ops.rookery.mlp_hidden_backward(grad, weight2, before, ctx.tanh, ctx.lean)
        after = kept[0] if kept else again
        needed = ctx.needs_input_grad  # frozen weights cost no product
        return (
            grad_before @ weight if needed[0] else None,
            grad_before.t() @ x if needed[1] else None,
            sums.to(ctx.bias),
            grad.t() @ after if needed[3] else None,
            grad.sum(0) if needed[4] else None,
            None,
            None,
            None,
        )


@torch.library.custom_op("rookery::mlp_hidden", mutates_args=(), tags=FREE_LAYOUT)
def _hidden(x: Tensor, weight: Tensor, bias: Tensor, tanh: bool, keep: bool) -> tuple[Tensor, Tensor]:
    with launching(x):
        return triton_module("mlp_kernel").forward(x.contiguous(), weight.contiguous(), bias.contiguous(), tanh, keep)


@_hidden.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, tanh: bool, keep: bool) -> tuple[Tensor, Tensor]:
    # `len` would be a constant to a compiler, and each size of a batch a program of its own.
    after = x.new_empty(x.shape[0], weight.shape[0])
    return after, torch.empty_like(after) if keep else x.new_empty(0)


@torch.library.custom_op("rookery::mlp_hidden_backward", mutates_args=(), tags=FREE_LAYOUT)
def _hidden_backward(
    grad: Tensor, weight: Tensor, before: Tensor, tanh: bool, again: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with launching(grad):
        return triton_module("mlp_kernel").backward(grad.contiguous(), weight.contiguous(), before, tanh, again)


@_hidden_backward.register_fake
def _(grad: Tensor, weight: Tensor, before: Tensor, tanh: bool, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    sums = before.new_empty(before.shape[1], dtype=torch.promote_types(before.dtype, torch.float32))
    return torch.empty_like(before), sums, torch.empty_like(before) if again else before.new_empty(0)
