"""Softmax attention over sequences of up to 256 tokens with the projection before it, for NesT's blocks and HVT.

PyTorch's fused attention hands back the gradients of queries, keys and values apart, and they have to be copied side by
side for the projection, then read once more for the gradient of its bias. Its fastest backward pass also adds up the
queries' in float32 in memory, in any order; in a fixed order it takes longer. A program of the kernels here has a whole
sequence: it writes all three gradients where they belong and sums them up, in one order. See `short_kernel`.

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
from pipeline.models.kernels import FREE_LAYOUT, computed_in, launching, takes, triton_module

MOST_TOKENS, HEAD_DIMS = 256, (16, 32, 64)


def check_attention_kernels(attn_drop: float) -> None:
    """Raise ModelError unless attention by kernels of this package can do it."""
    if attn_drop:
        raise ModelError(
            f"kernels=triton has no dropout of attention weights: attn_drop_rate={attn_drop:g}, set it to 0"
        )


def takes_short(x: Tensor, head_dim: int) -> bool:
    """Whether the kernels are for this input, (..., N, C); else it is PyTorch's attention that computes."""
    return takes(x) and x.shape[-2] <= MOST_TOKENS and head_dim in HEAD_DIMS


def short_attention(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    """Attention over the second axis behind a linear layer, with gradients: (B, N, C) -> (B, N, H D).

    Args:
        weight, bias: of the layer: ((H + 2 H') D, C) and ((H + 2 H') D,), queries of all heads, keys, values.
        num_heads: H.
        kv_heads: H', H or 1.

    Returns:
        In the type that products have.
    """
    dtype = computed_in(x)
    return _ShortAttention.apply(x.to(dtype), weight.to(dtype), bias, num_heads, kv_heads)


class _ShortAttention(torch.autograd.Function):
    """With the projection, since the gradient of its bias comes with that of the attention."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_heads: int, kv_heads: int) -> Tensor:
        qkv = F.linear(x, weight, bias.to(x.dtype))
        ctx.save_for_backward(x, weight, qkv)
        ctx.heads, ctx.bias = (num_heads, kv_heads), bias.dtype
        return torch.ops.rookery.short_attention(qkv, num_heads, kv_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, qkv = ctx.saved_tensors
        grad_qkv, sums = torch.ops.rookery.short_attention_backward(grad, qkv, *ctx.heads)
        needed = ctx.needs_input_grad  # a frozen weight costs no product
        grad_x = grad_qkv @ weight if needed[0] else None
        grad_weight = grad_qkv.flatten(0, 1).t() @ x.flatten(0, 1) if needed[1] else None
        return grad_x, grad_weight, sums.to(ctx.bias), None, None


@torch.library.custom_op("rookery::short_attention", mutates_args=(), tags=FREE_LAYOUT)
def _forward(qkv: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    with launching(qkv):
        return triton_module("short_kernel").forward(qkv.contiguous(), num_heads, kv_heads)


@_forward.register_fake
def _(qkv: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    width = qkv.shape[-1] // (num_heads + 2 * kv_heads) * num_heads
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], width)


@torch.library.custom_op("rookery::short_attention_backward", mutates_args=(), tags=FREE_LAYOUT)
def _backward(grad: Tensor, qkv: Tensor, num_heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    with launching(qkv):
        return triton_module("short_kernel").backward(grad.contiguous(), qkv.contiguous(), num_heads, kv_heads)


@_backward.register_fake
def _(grad: Tensor, qkv: Tensor, num_heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    sums = qkv.new_empty(qkv.shape[-1], dtype=torch.promote_types(qkv.dtype, torch.float32))
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), sums
