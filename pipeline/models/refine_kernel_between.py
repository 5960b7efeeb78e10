"""What lies between the Triton kernels behind `refine_fused`: their sums, and the arithmetic of vectors and H x H.

Each of those kernels leaves a record for every program. `gather_...` kernels merge many records into few (programs are
(runs of records, blocks of columns, groups)); the others, of one program for each group, merge these few and compute
what the next kernel takes. All merge in the order of the programs, so the same maps give the same bits.

A group's statistics lie one behind the other: mean and variance of the first and the second BatchNorm, (H',) each, and
of the third and the fourth, (H,) each. Notation, shapes and constants are those of `refine_kernel`; `WP` is H' with
padding, `EPS` and `SCALE` are the BatchNorms' epsilon and the refiner's last factor. What is (G, ...) has a part for
each group.
"""

# Triton grows tuples by adding others and has no starred entries.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.models.refine_kernel_parts import matrix, of_group, product

# Records that a program takes at a time, by their size: what registers hold.
SMALL: tl.constexpr = tl.constexpr(16)
LARGE: tl.constexpr = tl.constexpr(8)


@triton.jit
def row(vector, index, COUNT: tl.constexpr):
    """Of a vector, (n,), 0 from COUNT on."""
    return tl.load(vector + index, mask=index < COUNT, other=0.0)


@triton.jit
def merged_products(found, first, last, heads, HEADS: tl.constexpr, HP: tl.constexpr, TYPE: tl.constexpr):
    """Records (n, means (H,), products of differences (H, H)) as one: 0-D, (HP,), (HP, HP)."""
    SIZE: tl.constexpr = 1 + HEADS + HEADS * HEADS
    there_heads = heads < HEADS
    # Differences from a mean: those of means themselves would cancel.
    origin = row(found + first * SIZE + 1, heads, HEADS)
    n = tl.zeros((LARGE,), dtype=TYPE)
    sums = tl.zeros((HP,), dtype=TYPE)
    products = tl.zeros((HP, HP), dtype=TYPE)
    for start in range(first, last, LARGE):
        part = start + tl.arange(0, LARGE)
        record, there = found + part * SIZE, part < last
        count = tl.load(record, mask=there, other=0.0)
        mask = there[:, None] & there_heads[None, :]
        away = tl.load(record[:, None] + 1 + heads[None, :], mask=mask, other=0.0)
        away = tl.where(mask, away - origin[None, :], 0.0)
        at = record[:, None, None] + 1 + HEADS + heads[None, :, None] * HEADS + heads[None, None, :]
        of_part = tl.load(at, mask=mask[:, :, None] & there_heads[None, None, :], other=0.0)
        weighted = count[:, None] * away
        n += count
        sums += tl.sum(weighted, 0)
        products += tl.sum(of_part + weighted[:, :, None] * away[:, None, :], 0)
    total = tl.sum(n, 0)
    mean = sums / total
    return total, origin + mean, products - total * mean[:, None] * mean[None, :]


@triton.jit
def gather_products_kernel(
    found, gathered, parts, run,
    HEADS: tl.constexpr, HP: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Of the records of `covariance_kernel`, `run` at a time: (G, parts, ...) -> (G, programs, ...)."""
    SIZE: tl.constexpr = 1 + HEADS + HEADS * HEADS
    found = of_group(found, parts * SIZE)
    heads, first = tl.arange(0, HP), tl.program_id(0) * run
    n, mean, products = merged_products(found, first, tl.minimum(first + run, parts), heads, HEADS, HP, TYPE)
    report = of_group(gathered, tl.num_programs(0) * SIZE) + tl.program_id(0) * SIZE
    there = heads < HEADS
    tl.store(report, n)
    tl.store(report + 1 + heads, mean, mask=there)
    target = report + 1 + HEADS + heads[:, None] * HEADS + heads[None, :]
    tl.store(target, products, mask=there[:, None] & there[None, :])


@triton.jit
def merged_moments(
    found, first, last, channels, COUNT: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr, TYPE: tl.constexpr
):
    """Records (n, mean, squared differences) of one value as one, or, if PAIRS, (..., mean of another value, products
    of the differences of both); (COUNT,) each -> five times (C,), without PAIRS the last two are 0."""
    SIZE: tl.constexpr = (5 if PAIRS else 3) * COUNT
    origin = row(found + first * SIZE + COUNT, channels, COUNT)
    n = tl.zeros((C,), dtype=TYPE)
    sums = tl.zeros((C,), dtype=TYPE)
    squares = tl.zeros((C,), dtype=TYPE)
    others = tl.zeros((C,), dtype=TYPE)
    products = tl.zeros((C,), dtype=TYPE)
    if PAIRS:
        origin_other = row(found + first * SIZE + 3 * COUNT, channels, COUNT)
    for start in range(first, last, SMALL):
        part = start + tl.arange(0, SMALL)
        mask = (part < last)[:, None] & (channels < COUNT)[None, :]
        record = found + part[:, None] * SIZE + channels[None, :]
        count = tl.load(record, mask=mask, other=0.0)
        away = tl.where(mask, tl.load(record + COUNT, mask=mask, other=0.0) - origin[None, :], 0.0)
        n += tl.sum(count, 0)
        sums += tl.sum(count * away, 0)
        squares += tl.sum(tl.load(record + 2 * COUNT, mask=mask, other=0.0) + count * away * away, 0)
        if PAIRS:
            other = tl.load(record + 3 * COUNT, mask=mask, other=0.0)
            other = tl.where(mask, other - origin_other[None, :], 0.0)
            others += tl.sum(count * other, 0)
            products += tl.sum(tl.load(record + 4 * COUNT, mask=mask, other=0.0) + count * away * other, 0)
    n = tl.where(channels < COUNT, n, 1.0)
    mean, mean_other = sums / n, others / n
    squares -= n * mean * mean
    products -= n * mean * mean_other
    if PAIRS:
        mean_other += origin_other
    return n, origin + mean, squares, mean_other, products


@triton.jit
def gather_moments_kernel(
    found, gathered, parts, run,
    COUNT: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Of the records of `convolve_kernel` and, if PAIRS, `reduce_kernel`, `run` at a time."""
    SIZE: tl.constexpr = (5 if PAIRS else 3) * COUNT
    channels, first = tl.arange(0, C), tl.program_id(0) * run
    found = of_group(found, parts * SIZE)
    n, mean, squares, mean_other, products = merged_moments(
        found, first, tl.minimum(first + run, parts), channels, COUNT, C, PAIRS, TYPE
    )
    report = of_group(gathered, tl.num_programs(0) * SIZE) + tl.program_id(0) * SIZE + channels
    tl.store(report, n, mask=channels < COUNT)
    tl.store(report + COUNT, mean, mask=channels < COUNT)
    tl.store(report + 2 * COUNT, squares, mask=channels < COUNT)
    if PAIRS:
        tl.store(report + 3 * COUNT, mean_other, mask=channels < COUNT)
        tl.store(report + 4 * COUNT, products, mask=channels < COUNT)


@triton.jit
def gather_sums_kernel(found, gathered, parts, run, size, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    """Sums of records of `size` numbers, `run` records at a time: (G, parts, size) -> (G, programs, size)."""
    found = of_group(found, parts * size)
    first, at = tl.program_id(0) * run, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    last = tl.minimum(first + run, parts)
    sums = tl.zeros((BLOCK,), dtype=TYPE)
    for start in range(first, last, SMALL):
        part = start + tl.arange(0, SMALL)
        mask = (part < last)[:, None] & (at < size)[None, :]
        sums += tl.sum(tl.load(found + part[:, None] * size + at[None, :], mask=mask, other=0.0), 0)
    tl.store(of_group(gathered, tl.num_programs(0) * size) + tl.program_id(0) * size + at, sums, mask=at < size)


@triton.jit
def inverse(variance, EPS: tl.constexpr):
    return 1.0 / tl.sqrt(variance + EPS)


@triton.jit
def first_kernel(
    gathered, expand, weight, bias, statistics, known, covariance, weights, hidden, parts,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, WP: tl.constexpr, EPS: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """The first BatchNorm's statistics from the covariance of the maps, and the expansion with it.

    Args:
        gathered: (G, parts, 1 + H + H²), of `covariance_kernel`.
        expand, weight, bias: (H', H), and the BatchNorm's (H',).
        statistics: (G, 4 H' + 4 H), written: the first BatchNorm's.
        known: (G, 3, H); written: [1], means of the maps.
        covariance: (G, H, H), written.
        weights: (G, H', H) in the type of the maps, written: `expand` with the BatchNorm's scale.
        hidden: (G, 3, H'); written: [0], what `expanded` adds.
    """
    SIZE: tl.constexpr = 1 + HEADS + HEADS * HEADS
    heads, channels = tl.arange(0, HP), tl.arange(0, WP)
    inside = (channels < HIDDEN)[:, None] & (heads < HEADS)[None, :]
    gathered = of_group(gathered, parts * SIZE)
    n, center, products = merged_products(gathered, 0, parts, heads, HEADS, HP, TYPE)
    of_maps = products / n
    square = (heads < HEADS)[:, None] & (heads < HEADS)[None, :]
    target = of_group(covariance, HEADS * HEADS) + heads[:, None] * HEADS + heads[None, :]
    tl.store(target, of_maps, mask=square)
    tl.store(of_group(known, 3 * HEADS) + HEADS + heads, center, mask=heads < HEADS)

    w = matrix(expand, channels, heads, HIDDEN, HEADS)
    mean = tl.sum(w * center[None, :], 1)
    variance = tl.maximum(tl.sum(product(w, of_maps, TYPE) * w, 1), 0.0)
    report = of_group(statistics, 4 * HIDDEN + 4 * HEADS) + channels
    tl.store(report, mean, mask=channels < HIDDEN)
    tl.store(report + HIDDEN, variance, mask=channels < HIDDEN)
    scale = row(weight, channels, HIDDEN) * inverse(variance, EPS)
    scaled = (scale[:, None] * w).to(weights.dtype.element_ty)
    tl.store(of_group(weights, HIDDEN * HEADS) + channels[:, None] * HEADS + heads[None, :], scaled, mask=inside)
    shift = row(bias, channels, HIDDEN)
    if weights.dtype.element_ty.primitive_bitwidth == 16:
        shift -= tl.sum(scaled.to(TYPE) * center[None, :], 1)
    tl.store(of_group(hidden, 3 * HIDDEN) + channels, shift, mask=channels < HIDDEN)


@triton.jit
def second_kernel(
    gathered, weight, bias, statistics, hidden, parts,
    HEADS: tl.constexpr, HIDDEN: tl.constexpr, WP: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The second BatchNorm's statistics; `hidden` (G, 3, H') gets it as scale C + shift in [1] and [2].

    Args:
        gathered: (G, parts, 3, H'), of `convolve_kernel`.
    """
    channels = tl.arange(0, WP)
    there = channels < HIDDEN
    gathered = of_group(gathered, parts * 3 * HIDDEN)
    n, mean, squares, _, _ = merged_moments(gathered, 0, parts, channels, HIDDEN, WP, False, TYPE)
    variance = squares / n
    report = of_group(statistics, 4 * HIDDEN + 4 * HEADS) + 2 * HIDDEN + channels
    tl.store(report, mean, mask=there)
    tl.store(report + HIDDEN, variance, mask=there)
    scale = row(weight, channels, HIDDEN) * inverse(variance, EPS)
    report = of_group(hidden, 3 * HIDDEN) + HIDDEN + channels
    tl.store(report, scale, mask=there)
    tl.store(report + HIDDEN, row(bias, channels, HIDDEN) - scale * mean, mask=there)


@triton.jit
def heads_kernel(
    gathered, weight3, bias3, weight4, bias4, covariance, statistics, known, factors, parts,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """The last two BatchNorms' statistics, and the refined maps as factors · (R, A, 1).

    Args:
        gathered: (G, parts, 5, H), of `reduce_kernel`.
        known: (G, 3, H); written: [0], means of the reduced maps, and [2], covariances of each with its map.
        factors: (G, 3, H), written.
    """
    heads = tl.arange(0, HP)
    there = heads < HEADS
    gathered = of_group(gathered, parts * 5 * HEADS)
    n, mean, squares, _, products = merged_moments(gathered, 0, parts, heads, HEADS, HP, True, TYPE)
    variance, common = squares / n, products / n
    known = of_group(known, 3 * HEADS) + heads
    tl.store(known, mean, mask=there)
    tl.store(known + 2 * HEADS, common, mask=there)
    k3 = row(weight3, heads, HEADS) * inverse(variance, EPS)
    of_maps = row(of_group(covariance, HEADS * HEADS), heads * (HEADS + 1), HEADS * HEADS)
    summed = tl.maximum(k3 * k3 * variance + of_maps + 2 * k3 * common, 0.0)
    report = of_group(statistics, 4 * HIDDEN + 4 * HEADS) + 4 * HIDDEN + heads
    tl.store(report, mean, mask=there)
    tl.store(report + HEADS, variance, mask=there)
    center = tl.load(known + HEADS, mask=there, other=0.0)
    tl.store(report + 2 * HEADS, row(bias3, heads, HEADS) + center, mask=there)
    tl.store(report + 3 * HEADS, summed, mask=there)
    k4 = SCALE * row(weight4, heads, HEADS) * inverse(summed, EPS)
    report = of_group(factors, 3 * HEADS) + heads
    tl.store(report, k4 * k3, mask=there)
    tl.store(report + HEADS, k4, mask=there)
    tl.store(report + 2 * HEADS, SCALE * row(bias4, heads, HEADS), mask=there)
