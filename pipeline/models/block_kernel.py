"""The Triton kernels behind `block_attention`: one small block of tokens at a time, all of it in registers.

A program takes `STRIDE` blocks one after the other. Of each it reads keys and values once for all query heads that
share them, and reads and writes rows as the projection lays them out, so nothing is copied before or after. The
backward pass computes the maps again from queries and keys: for blocks this small that is cheaper than reading them.

Everything is summed in float32 (float64 for float64), in an order that doesn't depend on the number of blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Blocks that a program takes one after the other: fewer, longer programs start less often.
BLOCKS_A_PROGRAM = 4


@triton.jit
def _maps(q, k, SCALE: tl.constexpr, TYPE: tl.constexpr):
    """softmax(q kᵀ · scale) of one head: (N, D), (N, D) -> (N, N)."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=TYPE) * SCALE
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _forward_kernel(
    qkv, out, row, block, blocks,
    HEADS: tl.constexpr, SHARED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, TYPE: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """One group of `SHARED` query heads with its key and value, for `STRIDE` blocks.

    Args:
        qkv: (blocks, N, (HEADS + 2 HEADS / SHARED) D), rows `row` apart and blocks `block`.
        out: (blocks, N, HEADS D), contiguous.
    """
    group = tl.program_id(1)
    places, channels = tl.arange(0, N)[:, None], tl.arange(0, D)[None, :]
    for i in range(STRIDE):
        index = tl.program_id(0).to(tl.int64) * STRIDE + i
        if index < blocks:
            source = qkv + index * block + places * row + channels
            k = tl.load(source + (HEADS + group) * D)
            v = tl.load(source + (HEADS + HEADS // SHARED + group) * D)
            for h in range(SHARED):
                head = group * SHARED + h
                q = tl.load(source + head * D)
                maps = _maps(q, k, SCALE, TYPE)
                mixed = tl.dot(maps.to(v.dtype), v, input_precision="ieee", out_dtype=TYPE)
                target = out + index * N * HEADS * D + places * HEADS * D + head * D + channels
                tl.store(target, mixed.to(out.dtype.element_ty))


@triton.jit
def _backward_kernel(
    grad, qkv, grad_qkv, row, block, blocks,
    HEADS: tl.constexpr, SHARED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, TYPE: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """As `_forward_kernel`; with A the maps, O = A V and dO its gradient,

        dV = Aᵀ dO,   dA = dO Vᵀ,   dS = A ∘ (dA - rowsum(A ∘ dA)),   dQ = dS K · scale,   dK = dSᵀ Q · scale

    Args:
        grad: (blocks, N, HEADS D), contiguous.
        grad_qkv: as `qkv`, contiguous.
    """
    group = tl.program_id(1)
    places, channels = tl.arange(0, N)[:, None], tl.arange(0, D)[None, :]
    WIDTH: tl.constexpr = (HEADS + 2 * (HEADS // SHARED)) * D
    for i in range(STRIDE):
        index = tl.program_id(0).to(tl.int64) * STRIDE + i
        if index < blocks:
            source = qkv + index * block + places * row + channels
            target = grad_qkv + index * N * WIDTH + places * WIDTH + channels
            k = tl.load(source + (HEADS + group) * D)
            v = tl.load(source + (HEADS + HEADS // SHARED + group) * D)
            grad_k = tl.zeros((N, D), dtype=TYPE)
            grad_v = tl.zeros((N, D), dtype=TYPE)
            for h in range(SHARED):
                head = group * SHARED + h
                q = tl.load(source + head * D)
                above = tl.load(grad + index * N * HEADS * D + places * HEADS * D + head * D + channels)
                maps = _maps(q, k, SCALE, TYPE)
                grad_v += tl.dot(tl.trans(maps.to(v.dtype)), above, input_precision="ieee", out_dtype=TYPE)
                grad_maps = tl.dot(above, tl.trans(v), input_precision="ieee", out_dtype=TYPE)
                grad_logits = maps * (grad_maps - tl.sum(maps * grad_maps, 1)[:, None]) * SCALE
                grad_logits = grad_logits.to(q.dtype)
                grad_q = tl.dot(grad_logits, k, input_precision="ieee", out_dtype=TYPE)
                grad_k += tl.dot(tl.trans(grad_logits), q, input_precision="ieee", out_dtype=TYPE)
                tl.store(target + head * D, grad_q.to(grad_qkv.dtype.element_ty))
            tl.store(target + (HEADS + group) * D, grad_k.to(grad_qkv.dtype.element_ty))
            tl.store(target + (HEADS + HEADS // SHARED + group) * D, grad_v.to(grad_qkv.dtype.element_ty))


def forward(qkv: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    """(B, N, (H + 2 H') D) -> (B, N, H D)."""
    qkv, head_dim = _prepared(qkv, num_heads, kv_heads)
    out = qkv.new_empty(*qkv.shape[:2], num_heads * head_dim)
    _launch(_forward_kernel, qkv, num_heads, kv_heads, qkv, out)
    return out


def backward(grad: Tensor, qkv: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    """Gradient of `qkv` from that of the output."""
    qkv, _ = _prepared(qkv, num_heads, kv_heads)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _launch(_backward_kernel, qkv, num_heads, kv_heads, grad.contiguous(), qkv, grad_qkv)
    return grad_qkv


def settings(tokens: int, head_dim: int, num_heads: int, kv_heads: int, dtype: torch.dtype) -> dict[str, object]:
    """The constants that the kernels are compiled with."""
    return {
        "HEADS": num_heads,
        "SHARED": num_heads // kv_heads,
        "N": tokens,
        "D": head_dim,
        "SCALE": head_dim**-0.5,
        "TYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "STRIDE": BLOCKS_A_PROGRAM,
    }


def options(tokens: int, dtype: torch.dtype) -> dict[str, object]:
    """How they are compiled: a warp for 16 tokens, four without tensor cores, for want of registers."""
    return {"num_warps": tokens // 16 * (1 if dtype.itemsize == 2 else 4), "enable_fp_fusion": True}


def _prepared(qkv: Tensor, num_heads: int, kv_heads: int) -> tuple[Tensor, int]:
    """Rows without gaps, and the channels of a head."""
    return qkv if qkv.stride(-1) == 1 else qkv.contiguous(), qkv.shape[-1] // (num_heads + 2 * kv_heads)


def _launch(kernel: Any, qkv: Tensor, num_heads: int, kv_heads: int, *tensors: Tensor) -> None:
    blocks, tokens, width = qkv.shape
    constants = settings(tokens, width // (num_heads + 2 * kv_heads), num_heads, kv_heads, qkv.dtype)
    grid = triton.cdiv(blocks, BLOCKS_A_PROGRAM), kv_heads
    if blocks:  # a grid of nothing can't be started
        kernel[grid](*tensors, qkv.stride(1), qkv.stride(0), blocks, **constants, **options(tokens, qkv.dtype))
