"""What lies between the Triton kernels behind `refine_fused` in the backward pass; see `refine_kernel_between`.

`count` is the pixels of a group, and `grads` (G, size) the gradients of the parameters, one behind the other.
"""

# Triton grows tuples by adding others and has no starred entries.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.models.refine_kernel_between import inverse, row
from pipeline.models.refine_kernel_parts import matrix, number, of_group, product

# Records that a program takes at a time: matrices, so that registers hold few.
FEW: tl.constexpr = tl.constexpr(4)


@triton.jit
def sums_of(
    gathered, parts, size, rows, columns, STEP: tl.constexpr,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Of records that hold a matrix of COUNT rows, STEP apart, of WIDTH columns: the sum of all, (A, B)."""
    sums = tl.zeros((A, B), dtype=TYPE)
    inside = (rows < COUNT)[:, None] & (columns < WIDTH)[None, :]
    for start in range(0, parts, FEW):
        part = start + tl.arange(0, FEW)
        at = gathered + (part * size)[:, None, None] + (rows[:, None] * STEP + columns[None, :])[None, :, :]
        sums += tl.sum(tl.load(at, mask=(part < parts)[:, None, None] & inside[None, :, :], other=0.0), 0)
    return sums


@triton.jit
def heads_backward_kernel(
    gathered, weight3, weight4, statistics, known, behind_last, behind_third, grads, parts, count, size,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Behind the last two BatchNorms gradients are factors · (g, R, A, 1); x̂ of the fourth is inv4 (k3 R + A).

    Args:
        gathered: (G, parts, 3, H), of `head_sums_kernel`.
        behind_last, behind_third: (G, 4, H), written: for the gradient of what goes into the fourth BatchNorm, and of
            the reduced maps.
        grads: (G, size), written at its end: weight3, bias3, weight4, bias4. The fourth BatchNorm takes away whatever
            the third one's bias adds.
        count: pixels of a group.
    """
    heads = tl.arange(0, HP)
    there = heads < HEADS
    gathered, n = of_group(gathered, parts * 3 * HEADS), number(count, TYPE)
    which = tl.arange(0, 4)
    sums = sums_of(gathered, parts, 3 * HEADS, which, heads, HEADS, 3, HEADS, 4, HP, TYPE)
    sum_g = tl.sum(tl.where((which == 0)[:, None], sums, 0.0), 0)
    sum_gr = tl.sum(tl.where((which == 1)[:, None], sums, 0.0), 0)
    sum_ga = tl.sum(tl.where((which == 2)[:, None], sums, 0.0), 0)
    at = of_group(statistics, 4 * HIDDEN + 4 * HEADS) + 4 * HIDDEN
    variance = row(at + HEADS, heads, HEADS)
    inv3, inv4 = inverse(variance, EPS), inverse(row(at + 3 * HEADS, heads, HEADS), EPS)
    common = row(of_group(known, 3 * HEADS) + 2 * HEADS, heads, HEADS)
    k3, k4 = row(weight3, heads, HEADS) * inv3, SCALE * row(weight4, heads, HEADS) * inv4

    grad_weight4 = SCALE * inv4 * (k3 * sum_gr + sum_ga)
    pull = k4 * inv4 * inv4 * (k3 * sum_gr + sum_ga) / n
    grad_weight3 = inv3 * (k4 * sum_gr - pull * n * (k3 * variance + common))
    last = of_group(behind_last, 4 * HEADS) + heads
    third = of_group(behind_third, 4 * HEADS) + heads
    tl.store(last, k4, mask=there)
    tl.store(last + HEADS, -pull * k3, mask=there)
    tl.store(last + 2 * HEADS, -pull, mask=there)
    tl.store(last + 3 * HEADS, -k4 * sum_g / n, mask=there)
    tl.store(third, k3 * k4, mask=there)
    tl.store(third + HEADS, -pull * k3 * k3 - k3 * inv3 * grad_weight3 / n, mask=there)
    tl.store(third + 2 * HEADS, -pull * k3, mask=there)
    tl.store(third + 3 * HEADS, -k3 * k4 * sum_g / n, mask=there)
    report = of_group(grads, size) + size - 4 * HEADS + heads
    tl.store(report, grad_weight3, mask=there)
    tl.store(report + HEADS, tl.zeros((HP,), dtype=TYPE), mask=there)
    tl.store(report + 2 * HEADS, grad_weight4, mask=there)
    tl.store(report + 3 * HEADS, SCALE * sum_g, mask=there)


@triton.jit
def second_backward_kernel(
    gathered, weight2, statistics, factors, grads, parts, count, size,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, WP: tl.constexpr, K: tl.constexpr,
    EPS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Behind the second BatchNorm the gradient is factors · (D, C, 1).

    Args:
        gathered: (G, parts, H', H + 2), of `behind_second_kernel`.
        factors: (G, 3, H'), written.
        grads: (G, size); written: weight2, bias2, and reduce (H, H').
        count: pixels of a group.
    """
    WIDTH: tl.constexpr = HEADS + 2
    heads, channels = tl.arange(0, HP), tl.arange(0, WP)
    there, inside = channels < HIDDEN, (channels < HIDDEN)[:, None] & (heads < HEADS)[None, :]
    gathered, n = of_group(gathered, parts * HIDDEN * WIDTH), number(count, TYPE)
    grad_reduce = sums_of(
        gathered, parts, HIDDEN * WIDTH, channels, heads, WIDTH, HIDDEN, HEADS, WP, HP, TYPE
    )  # fmt: skip
    two = tl.arange(0, 2)
    sums = sums_of(gathered + HEADS, parts, HIDDEN * WIDTH, channels, two, WIDTH, HIDDEN, 2, WP, 2, TYPE)
    sum_d = tl.sum(tl.where((two == 0)[None, :], sums, 0.0), 1)
    at = of_group(statistics, 4 * HIDDEN + 4 * HEADS) + 2 * HIDDEN
    mean, inv = row(at, channels, HIDDEN), inverse(row(at + HIDDEN, channels, HIDDEN), EPS)
    grad_weight = inv * tl.sum(tl.where((two == 1)[None, :], sums, 0.0), 1)
    k = row(weight2, channels, HIDDEN) * inv
    pull = k * inv * grad_weight / n
    report = of_group(factors, 3 * HIDDEN) + channels
    tl.store(report, k, mask=there)
    tl.store(report + HIDDEN, -pull, mask=there)
    tl.store(report + 2 * HIDDEN, pull * mean - k * sum_d / n, mask=there)
    report = of_group(grads, size) + HIDDEN * (HEADS + 2 + K * K)
    tl.store(report + channels, grad_weight, mask=there)
    tl.store(report + HIDDEN + channels, sum_d, mask=there)
    tl.store(report + 2 * HIDDEN + heads[None, :] * HIDDEN + channels[:, None], grad_reduce, mask=inside)


@triton.jit
def first_backward_kernel(
    gathered, expand, weight1, statistics, covariance, mixed, behind_last, grads, parts, count, size,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, WP: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """What the first BatchNorm's statistics add: its normalised input is inv1 · expand A, linear in the maps.

    Args:
        gathered: (G, parts, H', H + 1 + K²), of `deconvolve_kernel`.
        mixed: (G, H, H) in the type of the maps, written: see `finish_kernel`.
        behind_last: (G, 4, H); changed: [3].
        grads: (G, size); written: expand (H', H), weight1, bias1, kernel (H', K²).
        count: pixels of a group.
    """
    WIDTH: tl.constexpr = HEADS + 1 + K * K
    SIZE: tl.constexpr = HIDDEN * WIDTH
    heads, channels, tap = tl.arange(0, HP), tl.arange(0, WP), tl.arange(0, KP)
    there, inside = channels < HIDDEN, (channels < HIDDEN)[:, None] & (heads < HEADS)[None, :]
    square = (heads < HEADS)[:, None] & (heads < HEADS)[None, :]
    gathered, n = of_group(gathered, parts * SIZE), number(count, TYPE)
    moments = sums_of(gathered, parts, SIZE, channels, heads, WIDTH, HIDDEN, HEADS, WP, HP, TYPE)
    one = tl.arange(0, 1)
    sum_e = tl.sum(sums_of(gathered + HEADS, parts, SIZE, channels, one, WIDTH, HIDDEN, 1, WP, 1, TYPE), 1)
    grad_kernel = sums_of(
        gathered + HEADS + 1, parts, SIZE, channels, tap, WIDTH, HIDDEN, K * K, WP, KP, TYPE
    )  # fmt: skip

    variance = row(of_group(statistics, 4 * HIDDEN + 4 * HEADS) + HIDDEN, channels, HIDDEN)
    inv = inverse(variance, EPS)
    w = matrix(expand, channels, heads, HIDDEN, HEADS)
    k = row(weight1, channels, HIDDEN) * inv
    grad_weight = inv * tl.sum(moments * w, 1)
    pull = k * inv * grad_weight / n
    mix = product(tl.trans(w), pull[:, None] * w, TYPE)
    target = of_group(mixed, HEADS * HEADS) + heads[:, None] * HEADS + heads[None, :]
    tl.store(target, mix.to(mixed.dtype.element_ty), mask=square)
    at = of_group(behind_last, 4 * HEADS) + 3 * HEADS + heads
    shift = tl.sum(w * (k * sum_e / n)[:, None], 0)
    tl.store(at, tl.load(at, mask=heads < HEADS, other=0.0) - shift, mask=heads < HEADS)
    of_maps = matrix(of_group(covariance, HEADS * HEADS), heads, heads, HEADS, HEADS)
    grad_expand = k[:, None] * (moments - (inv * grad_weight)[:, None] * product(w, of_maps, TYPE))

    grads = of_group(grads, size)
    tl.store(grads + channels[:, None] * HEADS + heads[None, :], grad_expand, mask=inside)
    grads += HIDDEN * HEADS
    tl.store(grads + channels, grad_weight, mask=there)
    tl.store(grads + HIDDEN + channels, sum_e, mask=there)
    target = grads + 2 * HIDDEN + channels[:, None] * (K * K) + tap[None, :]
    tl.store(target, grad_kernel, mask=there[:, None] & (tap < K * K)[None, :])
