"""The Triton kernels behind `fused_mlp`: products of matrices that end with what else would be a pass of its own.

Forward, the first linear layer of an MLP and GELU; backward, what the second one hands back times GELU's slope, and its
sums over all rows, which are the gradient of the first one's bias. A program computes `BM` rows of `BN` hidden
channels; programs of the same rows follow one another, so that these come from memory once. Products are summed in
float32 (float64 for float64), and everything in an order that depends on the number of rows alone.

Shapes: T rows (tokens), C channels, F hidden channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _share(x, square, TANH: tl.constexpr):
    """GELU(x) / x: by tanh the logistic function at 2 √(2/π) (x + 0.044715 x³), else the normal distribution's at x."""
    if TANH:
        # Of a power of 2, which is what a GPU has.
        return 1.0 / (1.0 + tl.exp2(x * (-2.302208198144325 - 0.1029432395800235 * square)))
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _slope(x, square, share, TANH: tl.constexpr):
    """GELU'(x)."""
    if TANH:
        part = x * share
        return share + (part - part * share) * (1.5957691216057308 + 0.21406444881780073 * square)
    return share + x * (0.3989422804014327 * tl.exp2(-0.7213475204444817 * square))


@triton.jit
def _products(
    rows, weight, row, there, first, DIM: tl.constexpr, HIDDEN: tl.constexpr, ALONG: tl.constexpr, ACROSS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Of some rows with some hidden channels: the first (BM, BN / 2) and the others.

    Args:
        rows: (T, C).
        weight: has its channels `ALONG` apart and its hidden channels `ACROSS`.
        row, there: which rows, and whether they exist.
        first: of the hidden channels.
    """
    depth, channel = tl.arange(0, BK), first + tl.arange(0, BN)
    inside = channel < HIDDEN
    left = rows + row.to(tl.int64)[:, None] * DIM + depth[None, :]
    right = weight + depth[:, None] * ALONG + channel[None, :] * ACROSS
    total = tl.zeros((BM, BN), dtype=TYPE)
    for start in range(0, DIM, BK):
        if DIM % BK:
            within = start + depth < DIM
            a = tl.load(left, mask=there[:, None] & within[None, :], other=0.0)
            b = tl.load(right, mask=within[:, None] & inside[None, :], other=0.0)
        else:
            a = tl.load(left, mask=there[:, None], other=0.0)
            b = tl.load(right, mask=inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=TYPE)
        left += BK
        right += BK * ALONG
    # Halves, so that what follows needs the registers of one.
    return total.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def forward_kernel(
    x, weight, bias, before, after, count,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, TANH: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """GELU of the first linear layer.

    Args:
        x: (T, C); count: T.
        weight: (F, C).
        bias: (F,).
        before: (T, F) what goes into GELU, written if KEEP.
        after: (T, F) what comes out, of what was not rounded before.
    """
    COLUMNS: tl.constexpr = (HIDDEN + BN - 1) // BN
    row = tl.program_id(0) // COLUMNS * BM + tl.arange(0, BM)
    first = tl.program_id(0) % COLUMNS * BN
    there = row < count
    halves = _products(x, weight, row, there, first, DIM, HIDDEN, 1, DIM, BM, BN, BK, TYPE)
    for half in tl.static_range(2):
        channel = first + half * (BN // 2) + tl.arange(0, BN // 2)
        inside = channel < HIDDEN
        found = halves[half] + tl.load(bias + channel, mask=inside, other=0.0).to(TYPE)[None, :]
        place, mask = row.to(tl.int64)[:, None] * HIDDEN + channel[None, :], there[:, None] & inside[None, :]
        if KEEP:
            tl.store(before + place, found.to(before.dtype.element_ty), mask=mask)
        tl.store(after + place, (found * _share(found, found * found, TANH)).to(after.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad, weight, before, grad_before, sums, after, count,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, TANH: tl.constexpr, AGAIN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Gradient of what goes into GELU, and its sum over rows.

    Args:
        grad: (T, C), of the second linear layer's output; count: T.
        weight: (C, F), its weight.
        before: (T, F), as the forward kernel kept it.
        grad_before: (T, F), written.
        sums: (programs of rows, F), written: of the gradient as it was before it was rounded.
        after: (T, F) what comes out of GELU, written once more if AGAIN.
    """
    COLUMNS: tl.constexpr = (HIDDEN + BN - 1) // BN
    tile, first = tl.program_id(0) // COLUMNS, tl.program_id(0) % COLUMNS * BN
    row = tile * BM + tl.arange(0, BM)
    there = row < count
    halves = _products(grad, weight, row, there, first, DIM, HIDDEN, HIDDEN, 1, BM, BN, BK, TYPE)
    for half in tl.static_range(2):
        channel = first + half * (BN // 2) + tl.arange(0, BN // 2)
        inside = channel < HIDDEN
        place, mask = row.to(tl.int64)[:, None] * HIDDEN + channel[None, :], there[:, None] & inside[None, :]
        x = tl.load(before + place, mask=mask, other=0.0).to(TYPE)
        square = x * x
        share = _share(x, square, TANH)
        found = halves[half] * _slope(x, square, share, TANH)
        tl.store(grad_before + place, found.to(grad_before.dtype.element_ty), mask=mask)
        tl.store(sums + tile * HIDDEN + channel, tl.sum(found, 0), mask=inside)
        if AGAIN:
            tl.store(after + place, (x * share).to(after.dtype.element_ty), mask=mask)


def forward(x: Tensor, weight: Tensor, bias: Tensor, tanh: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """(T, C), (F, C), (F,) -> (T, F) what comes out of GELU, and what goes in: empty unless `keep`."""
    after = x.new_empty(len(x), len(weight))
    before = torch.empty_like(after) if keep else x.new_empty(0)
    constants = {"TANH": tanh, "KEEP": keep}
    _launch(forward_kernel, weight.shape[1], len(weight), (x, weight, bias, before, after), constants)
    return after, before


def backward(grad: Tensor, weight: Tensor, before: Tensor, tanh: bool, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(T, C), (C, F), (T, F) -> gradient of `before`, its sums (F,), what comes out of GELU: empty unless `again`."""
    dim, hidden = weight.shape
    grad_before = torch.empty_like(before)
    after = torch.empty_like(before) if again else before.new_empty(0)
    programs = triton.cdiv(len(grad), settings(dim, grad.dtype)["BM"])
    sums = before.new_empty(programs, hidden, dtype=torch.promote_types(before.dtype, torch.float32))
    tensors = grad, weight, before, grad_before, sums, after
    _launch(backward_kernel, dim, hidden, tensors, {"TANH": tanh, "AGAIN": again})
    return grad_before, sums.sum(0), after


def settings(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes of a program: small ones without tensor cores, for want of registers."""
    large = dtype.itemsize == 2
    return {
        "BM": 128 if large else 32,
        "BN": 128 if large else 32,
        "BK": 64 if large and dim % 64 == 0 else 32,
        "TYPE": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def options(dtype: torch.dtype) -> dict[str, Any]:
    """How they are compiled: on an H100 with room for two programs, of which one multiplies while the other stores."""
    large = dtype.itemsize == 2
    return {"num_warps": 8 if large else 4, "num_stages": 3 if large else 1, "enable_fp_fusion": True}


def _launch(kernel: Any, dim: int, hidden: int, tensors: tuple[Tensor, ...], constants: dict[str, Any]) -> None:
    rows, sizes = tensors[0], settings(dim, tensors[0].dtype)
    grid = (triton.cdiv(len(rows), sizes["BM"]) * triton.cdiv(hidden, sizes["BN"]),)
    if len(rows):  # a grid of nothing can't be started
        kernel[grid](*tensors, len(rows), DIM=dim, HIDDEN=hidden, **constants, **sizes, **options(rows.dtype))
