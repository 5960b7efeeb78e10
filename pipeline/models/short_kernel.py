"""The Triton kernels behind `short_attention`: sequences whose keys and values a program holds as a whole.

A program takes a sequence and one key with the heads that share it. It goes through the queries tile by tile, each with
all keys at once, so that a softmax knows its whole row; the backward pass needs no more than queries, keys and values,
and writes their gradients as the projection lays them out, one beside the other. Nothing is added up by several
programs but the gradient of the projection's bias, and that in the order of the sequences.

Shapes: B sequences of N tokens, `NP` with padding, H heads of D channels, H' keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _powers(a, b, inside, AXIS: tl.constexpr, SCALE: tl.constexpr, TYPE: tl.constexpr):
    """softmax(a bᵀ · scale) along an axis, which is that of the keys, but for its denominator.

    Args:
        inside: whether there is such a key, in the shape of one row or column.
    """
    # Powers of 2, which is what a GPU has.
    logits = tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=TYPE) * (SCALE * 1.4426950408889634)
    logits = tl.where(inside, logits, float("-inf"))
    return tl.exp2(logits - tl.expand_dims(tl.max(logits, AXIS), AXIS))


@triton.jit
def forward_kernel(
    qkv, out,
    HEADS: tl.constexpr, SHARED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, SCALE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Programs are (sequences, keys).

    Args:
        qkv: (B, N, (H + 2 H') D).
        out: (B, N, H D).
    """
    group = tl.program_id(1)
    WIDTH: tl.constexpr = (HEADS + 2 * (HEADS // SHARED)) * D
    tokens, channels = tl.arange(0, NP), tl.arange(0, D)[None, :]
    inside = tokens < N
    qkv += tl.program_id(0).to(tl.int64) * N * WIDTH
    out += tl.program_id(0).to(tl.int64) * N * HEADS * D
    rows = qkv + tokens[:, None] * WIDTH + channels
    k = tl.load(rows + (HEADS + group) * D, mask=inside[:, None], other=0.0)
    v = tl.load(rows + (HEADS + HEADS // SHARED + group) * D, mask=inside[:, None], other=0.0)
    for h in range(SHARED):
        head = group * SHARED + h
        for start in range(0, N, BQ):
            places = start + tl.arange(0, BQ)
            there = (places < N)[:, None]
            q = tl.load(qkv + places[:, None] * WIDTH + head * D + channels, mask=there, other=0.0)
            powers = _powers(q, k, inside[None, :], 1, SCALE, TYPE)
            mixed = tl.dot(powers.to(v.dtype), v, input_precision="ieee", out_dtype=TYPE)
            mixed *= (1.0 / tl.sum(powers, 1))[:, None]
            target = out + places[:, None] * (HEADS * D) + head * D + channels
            tl.store(target, mixed.to(out.dtype.element_ty), mask=there)


@triton.jit
def backward_kernel(
    grad, qkv, grad_qkv, sums,
    HEADS: tl.constexpr, SHARED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, SCALE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`; with A the maps, O = A V and dO its gradient,

        dV = Aᵀ dO,   dA = dO Vᵀ,   dS = A ∘ (dA - rowsum(A ∘ dA)),   dQ = dS K · scale,   dK = dSᵀ Q · scale

    Args:
        grad: dO, (B, N, H D).
        grad_qkv: as `qkv`, written.
        sums: (B, (H + 2 H') D), written: of `grad_qkv` over tokens, before it was rounded.
    """
    group = tl.program_id(1)
    WIDTH: tl.constexpr = (HEADS + 2 * (HEADS // SHARED)) * D
    tokens, channels = tl.arange(0, NP), tl.arange(0, D)
    inside = tokens < N
    qkv += tl.program_id(0).to(tl.int64) * N * WIDTH
    grad_qkv += tl.program_id(0).to(tl.int64) * N * WIDTH
    grad += tl.program_id(0).to(tl.int64) * N * HEADS * D
    sums += tl.program_id(0).to(tl.int64) * WIDTH + channels
    rows = tokens[:, None] * WIDTH + channels[None, :]
    of_k: tl.constexpr = HEADS * D
    of_v: tl.constexpr = (HEADS + HEADS // SHARED) * D
    k = tl.load(qkv + rows + of_k + group * D, mask=inside[:, None], other=0.0)
    v = tl.load(qkv + rows + of_v + group * D, mask=inside[:, None], other=0.0)
    grad_k = tl.zeros((NP, D), dtype=TYPE)
    grad_v = tl.zeros((NP, D), dtype=TYPE)
    for h in range(SHARED):
        head = group * SHARED + h
        sum_q = tl.zeros((D,), dtype=TYPE)
        for start in range(0, N, BQ):
            places = start + tl.arange(0, BQ)
            there = (places < N)[:, None]
            query = places[:, None] * WIDTH + head * D + channels[None, :]
            q = tl.load(qkv + query, mask=there, other=0.0)
            # Of tokens that don't exist the gradient is 0, and so is all that they would add.
            above = tl.load(grad + places[:, None] * (HEADS * D) + head * D + channels[None, :], mask=there, other=0.0)
            # The maps lie on their side, since two of the three products with them take them like that.
            powers = _powers(k, q, inside[:, None], 0, SCALE, TYPE)
            maps = powers * (1.0 / tl.sum(powers, 0))[None, :]
            grad_v += tl.dot(maps.to(v.dtype), above, input_precision="ieee", out_dtype=TYPE)
            grad_maps = tl.dot(v, tl.trans(above), input_precision="ieee", out_dtype=TYPE)
            grad_logits = maps * (grad_maps - tl.sum(maps * grad_maps, 0)[None, :]) * SCALE
            grad_logits = grad_logits.to(q.dtype)
            grad_k += tl.dot(grad_logits, q, input_precision="ieee", out_dtype=TYPE)
            grad_q = tl.dot(tl.trans(grad_logits), k, input_precision="ieee", out_dtype=TYPE)
            tl.store(grad_qkv + query, grad_q.to(grad_qkv.dtype.element_ty), mask=there)
            sum_q += tl.sum(grad_q, 0)
        tl.store(sums + head * D, sum_q)
    tl.store(grad_qkv + rows + of_k + group * D, grad_k.to(grad_qkv.dtype.element_ty), mask=inside[:, None])
    tl.store(grad_qkv + rows + of_v + group * D, grad_v.to(grad_qkv.dtype.element_ty), mask=inside[:, None])
    tl.store(sums + of_k + group * D, tl.sum(grad_k, 0))
    tl.store(sums + of_v + group * D, tl.sum(grad_v, 0))


def forward(qkv: Tensor, num_heads: int, kv_heads: int) -> Tensor:
    """(B, N, (H + 2 H') D) -> (B, N, H D)."""
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // (num_heads + 2 * kv_heads) * num_heads)
    _launch(forward_kernel, qkv, num_heads, kv_heads, qkv, out)
    return out


def backward(grad: Tensor, qkv: Tensor, num_heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Gradient of `qkv` from that of the output, and its sum over all tokens, ((H + 2 H') D,)."""
    grad_qkv = torch.empty_like(qkv)
    sums = qkv.new_empty(len(qkv), qkv.shape[2], dtype=torch.promote_types(qkv.dtype, torch.float32))
    _launch(backward_kernel, qkv, num_heads, kv_heads, grad, qkv, grad_qkv, sums)
    return grad_qkv, sums.sum(0)


def settings(tokens: int, head_dim: int, num_heads: int, kv_heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants that both kernels are compiled with, but for `BQ`."""
    return {
        "HEADS": num_heads,
        "SHARED": num_heads // kv_heads,
        "N": tokens,
        "NP": max(16, triton.next_power_of_2(tokens)),
        "D": head_dim,
        "SCALE": head_dim**-0.5,
        "TYPE": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def options(kernel: Any, tokens: int, head_dim: int, hopper: bool) -> tuple[int, dict[str, Any]]:
    """`BQ`, queries at a time, and how the kernels are compiled: as many as there are registers for their maps.

    Args:
        hopper: whether products are those of an H100, which take their second factor from shared memory.
    """
    many = tokens > 128
    if kernel is forward_kernel:
        queries, warps = 64, 4
    elif many and hopper and head_dim <= 32:
        queries, warps = 16, 4
    else:
        queries, warps = 32, 8 if many else 4
    return queries, {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def _launch(kernel: Any, qkv: Tensor, num_heads: int, kv_heads: int, *tensors: Tensor) -> None:
    sequences, tokens, width = qkv.shape
    head_dim = width // (num_heads + 2 * kv_heads)
    constants = settings(tokens, head_dim, num_heads, kv_heads, qkv.dtype)
    hopper = qkv.is_cuda and torch.cuda.get_device_capability(qkv.device)[0] == 9
    queries, how = options(kernel, tokens, head_dim, hopper)
    if sequences:  # a grid of nothing can't be started
        kernel[sequences, kv_heads](*tensors, **constants, BQ=queries, **how)
