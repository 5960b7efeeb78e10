"""Softmax attention inside of small blocks as one kernel, for NesT on CIFAR: 16 tokens, one key for all heads.

PyTorch's fused attention cuts queries and keys into tiles of 64 and more, of which 16 tokens use a corner, and wants
heads as an axis of their own: three copies before it, one after. The kernel here reads the rows of the projection and
writes the rows that the next one reads, forward and backward; see `block_kernel`.

It is opt-in (`Nest(kernels="triton")`): it rounds otherwise than PyTorch's, so a run has it or not from its first step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.models.errors import ModelError
from pipeline.models.kernels import FREE_LAYOUT, launching, triton_module

TOKENS, HEAD_DIMS = (16, 64), (16, 32, 64, 128)


def check_block_attention(head_dim: int) -> None:
    """Raise ModelError unless the kernels can do it, in blocks of `TOKENS`."""
    if head_dim not in HEAD_DIMS:
        widths = ", ".join(map(str, HEAD_DIMS))
        raise ModelError(f"kernels=triton is for heads of {widths} channels, these have {head_dim}: leave it out")


def block_attention(qkv: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    """Attention over the second axis, with gradients.

    Args:
        qkv: (B, N, (H + 2 H') D): queries of all heads, keys, values.
        num_heads: H.
        kv_heads: H', H or 1.

    Returns:
        (B, N, H D), in the type of `qkv`.
    """
    return torch.ops.rookery.block_attention(qkv, num_heads, kv_heads)


@torch.library.custom_op("rookery::block_attention", mutates_args=(), tags=FREE_LAYOUT)
def _forward(qkv: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    with launching(qkv):
        return triton_module("block_kernel").forward(qkv, num_heads, kv_heads)


@_forward.register_fake
def _(qkv: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    width = qkv.shape[-1] // (num_heads + 2 * kv_heads) * num_heads
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], width)


@torch.library.custom_op("rookery::block_attention_backward", mutates_args=(), tags=FREE_LAYOUT)
def _backward(grad: Tensor, qkv: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    with launching(qkv):
        return triton_module("block_kernel").backward(grad, qkv, num_heads, kv_heads)


@_backward.register_fake
def _(grad: Tensor, qkv: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.num_heads, ctx.kv_heads = inputs
    ctx.save_for_backward(qkv)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (qkv,) = ctx.saved_tensors
    return torch.ops.rookery.block_attention_backward(grad, qkv, ctx.num_heads, ctx.kv_heads), None, None


_forward.register_autograd(_gradient, setup_context=_remember)
