"""The Triton kernels behind `sum_norm`: a residual sum and the LayerNorm of it in one pass over memory, back as well.

A program takes whole rows, a few at a time, so that mean and variance need no second look. Backward it takes several
times as many in turn and adds up the gradients of what all rows share on the way: of LayerNorm's weight and bias, and
of the branch's bias. All arithmetic is in float32 (float64 for float64), all sums are taken in an order that depends on
the number of rows alone.

Shapes: T rows (tokens), C channels, S samples of T / S rows each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program's rows at a time, and how many programs there are at the most, backward.
_ELEMENTS, _PROGRAMS = 2048, 1024


@triton.jit
def _factor(scale, row, there, samples, TIMES: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr):
    """What a branch is multiplied by, for each row: (BM, 1)."""
    factor = tl.full(row.shape, TIMES, TYPE)
    if SCALED:
        factor = tl.load(scale + row // samples, mask=there, other=0.0).to(TYPE) * TIMES
    return factor[:, None]


@triton.jit
def _centred(value, inside, EPS: tl.constexpr, DIM: tl.constexpr):
    """Rows less their mean, and 1 / √(variance + ε)."""
    away = tl.where(inside[None, :], value - tl.sum(value, 1)[:, None] / DIM, 0.0)
    return away, 1.0 / tl.sqrt(tl.sum(away * away, 1)[:, None] / DIM + EPS)


@triton.jit
def forward_kernel(
    x, branch, bias, scale, weight, shift, total, normed, count, samples,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, TIMES: tl.constexpr, EPS: tl.constexpr,
    ADDS: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr, NORMS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """A residual sum, x + scale · TIMES · (branch + bias), and its LayerNorm.

    Args:
        x: (T, C); count: T.
        branch: (T, C), if ADDS.
        bias: (C,), if BIASED.
        scale: (S,), if SCALED; samples: rows of a sample.
        weight, shift: (C,) of the LayerNorm, if NORMS.
        total: (T, C), written if ADDS: the sum.
        normed: (T, C), written if NORMS: the LayerNorm of the sum, or of x.
    """
    row, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, WIDTH)
    there, inside = row < count, channel < DIM
    place, mask = row.to(tl.int64)[:, None] * DIM + channel[None, :], there[:, None] & inside[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(TYPE)
    if ADDS:
        added = tl.load(branch + place, mask=mask, other=0.0).to(TYPE)
        if BIASED:
            added += tl.load(bias + channel, mask=inside, other=0.0).to(TYPE)[None, :]
        value += added * _factor(scale, row, there, samples, TIMES, SCALED, TYPE)
        kept = value.to(total.dtype.element_ty)
        tl.store(total + place, kept, mask=mask)
        value = kept.to(TYPE)  # what the backward pass will see
    if NORMS:
        away, inverse = _centred(value, inside, EPS, DIM)
        gain = tl.load(weight + channel, mask=inside, other=0.0).to(TYPE)
        offset = tl.load(shift + channel, mask=inside, other=0.0).to(TYPE)
        found = away * inverse * gain[None, :] + offset[None, :]
        tl.store(normed + place, found.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad_total, grad_normed, total, scale, weight, grad_x, grad_branch, sums, count, samples, tiles,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, TIMES: tl.constexpr, EPS: tl.constexpr,
    ADDS: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr, NORMS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of the branch and of what all rows share.

    Args:
        grad_total: (T, C), of the sum; count: T.
        grad_normed: (T, C), of the LayerNorm, if NORMS.
        total: (T, C) the sum, if NORMS.
        scale, weight, samples: as for the forward kernel.
        grad_x: (T, C), written if NORMS: the gradient of the sum through both; else it is `grad_total`.
        grad_branch: (T, C), written if ADDS.
        sums: (1 or 3, programs, C), written: of this program's rows, the gradient of the branch's bias if BIASED, as
            it was before it was rounded, and those of LayerNorm's weight and bias if NORMS.
        tiles: how many times BM rows a program takes.
    """
    channel = tl.arange(0, WIDTH)
    inside = channel < DIM
    sum_weight, sum_shift = tl.zeros((BM, WIDTH), dtype=TYPE), tl.zeros((BM, WIDTH), dtype=TYPE)
    sum_bias = tl.zeros((BM, WIDTH), dtype=TYPE)
    for tile in range(tl.program_id(0) * tiles, (tl.program_id(0) + 1) * tiles):
        row = tile * BM + tl.arange(0, BM)
        there = row < count
        place, mask = row.to(tl.int64)[:, None] * DIM + channel[None, :], there[:, None] & inside[None, :]
        grad = tl.load(grad_total + place, mask=mask, other=0.0).to(TYPE)
        if NORMS:
            value = tl.load(total + place, mask=mask, other=0.0).to(TYPE)
            above = tl.load(grad_normed + place, mask=mask, other=0.0).to(TYPE)
            gain = tl.load(weight + channel, mask=inside, other=0.0).to(TYPE)
            away, inverse = _centred(value, inside, EPS, DIM)
            unit, inner = away * inverse, above * gain[None, :]
            sum_weight += above * unit
            sum_shift += above
            along = tl.sum(inner * unit, 1)[:, None] / DIM
            grad += (inner - unit * along - tl.sum(inner, 1)[:, None] / DIM) * inverse
            tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=mask)
        if ADDS:
            found = grad * _factor(scale, row, there, samples, TIMES, SCALED, TYPE)
            tl.store(grad_branch + place, found.to(grad_branch.dtype.element_ty), mask=mask)
            if BIASED:
                # Rows that don't exist, and channels, have no gradient.
                sum_bias += tl.where(mask, found, 0.0)
    program, programs = tl.program_id(0), tl.num_programs(0)
    if BIASED:
        tl.store(sums + program * DIM + channel, tl.sum(sum_bias, 0), mask=inside)
    if NORMS:
        tl.store(sums + (programs + program) * DIM + channel, tl.sum(sum_weight, 0), mask=inside)
        tl.store(sums + (2 * programs + program) * DIM + channel, tl.sum(sum_shift, 0), mask=inside)


def forward(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    times: float,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    total: Tensor,
    normed: Tensor,
) -> None:
    """Fill `total` and `normed`, (T, C) or empty, from (T, C), (T, C), (C,), (S,), (C,), (C,)."""
    tensors = x, branch, bias, scale, weight, shift, total, normed
    count, constants = len(x), _constants(x, branch is not None, bias is not None, scale, times, weight, eps)
    if count:  # a grid of nothing can't be started
        grid = (triton.cdiv(count, constants["BM"]),)
        # What isn't there isn't read, but has to be a pointer.
        given = [x if tensor is None else tensor for tensor in tensors]
        forward_kernel[grid](*given, count, _rows(count, scale), **constants)


def backward(
    grad_total: Tensor,
    grad_normed: Tensor | None,
    total: Tensor | None,
    adds: bool,
    biased: bool,
    scale: Tensor | None,
    times: float,
    weight: Tensor | None,
    eps: float,
    grad_x: Tensor,
    grad_branch: Tensor,
) -> Tensor:
    """Fill `grad_x` and `grad_branch`, (T, C) or empty, and give the sums, (3, C), without a LayerNorm (1, C).

    Args:
        adds, biased: whether there are a branch and a bias of it; without the latter the first sum is none.
    """
    count, dim = grad_total.shape
    constants = _constants(grad_total, adds, biased, scale, times, weight, eps)
    tiles, programs = share(count, constants["BM"])
    sums = grad_total.new_empty(
        1 if weight is None else 3, programs, dim, dtype=torch.promote_types(grad_total.dtype, torch.float32)
    )
    tensors = grad_total, grad_normed, total, scale, weight, grad_x, grad_branch, sums
    if count:
        given = [grad_total if tensor is None else tensor for tensor in tensors]
        backward_kernel[programs,](*given, count, _rows(count, scale), tiles, **constants)
    return sums.sum(1)


def share(count: int, rows: int) -> tuple[int, int]:
    """How many times `rows` a program takes, and how many programs that makes: enough for any GPU, and few sums."""
    tiles = max(1, triton.cdiv(count, rows * _PROGRAMS))
    return tiles, triton.cdiv(count, rows * tiles)


def settings(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes of a program, of rows of that type."""
    width = triton.next_power_of_2(dim)
    return {
        "DIM": dim,
        "WIDTH": width,
        "BM": max(1, _ELEMENTS // width),
        "TYPE": tl.float64 if dtype == torch.float64 else tl.float32,
    }


OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _constants(
    x: Tensor, adds: bool, biased: bool, scale: Tensor | None, times: float, weight: Tensor | None, eps: float
) -> dict[str, Any]:
    there = {"ADDS": adds, "BIASED": biased, "SCALED": scale is not None}
    sizes = settings(x.shape[1], x.dtype)
    return {"TIMES": times, "EPS": eps, "NORMS": weight is not None, **there, **sizes, **OPTIONS}


def _rows(count: int, scale: Tensor | None) -> int:
    return count if scale is None else count // len(scale)
