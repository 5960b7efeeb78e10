"""The Triton kernels behind `refine_fused`, backward; forms, shapes and constants are those of `refine_kernel`.

A is the maps and R the reduced maps, both less their means here, g the gradient of the refined maps, C what goes into
the second BatchNorm. The last two BatchNorms are linear in a pixel once their statistics and the sums of
`head_sums_kernel` are known, so the gradients behind them are combinations of g, R and A and are never written.
"""

# Triton grows tuples by adding others and has no starred entries.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.models.refine_kernel_parts import (
    clamped,
    column,
    edges,
    expanded,
    matrix,
    neighbours,
    of_group,
    place,
    product,
    pushed,
    taps,
    tiles,
    zeros,
)


@triton.jit
def at_pixels(grad, reduced, maps, offsets, inside, mean_r, mean_a, TYPE: tl.constexpr):
    """g, R and A; outside of the maps what is left of 0 less the means."""
    g = tl.load(grad + offsets, mask=inside, other=0.0).to(TYPE)
    r = tl.load(reduced + offsets, mask=inside, other=0.0).to(TYPE) - mean_r
    a = tl.load(maps + offsets, mask=inside, other=0.0).to(TYPE) - mean_a
    return g, r, a


@triton.jit
def head_sums_kernel(
    grad, reduced, maps, known, found, plane,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Sums of g, g R and g A over `TILES` times `SIZE` pixels of one map; programs are (maps, runs, groups).

    Args:
        found: (G, samples, runs, 3, H).
    """
    sample, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    source = (of_group(0, tl.num_programs(0)) + tl.program_id(0)) * plane
    known = of_group(known, 3 * HEADS) + head
    mean_r, mean_a = tl.load(known), tl.load(known + HEADS)
    sums = tl.zeros((SIZE,), dtype=TYPE)
    sums_r = tl.zeros((SIZE,), dtype=TYPE)
    sums_a = tl.zeros((SIZE,), dtype=TYPE)
    for i in range(TILES):
        at = (tl.program_id(1) * TILES + i) * SIZE + tl.arange(0, SIZE)
        g = tl.load(grad + source + at, mask=at < plane, other=0.0).to(TYPE)
        sums += g
        sums_r += g * (tl.load(reduced + source + at, mask=at < plane, other=0.0).to(TYPE) - mean_r)
        sums_a += g * (tl.load(maps + source + at, mask=at < plane, other=0.0).to(TYPE) - mean_a)
    report = of_group(found, tl.num_programs(0) * tl.num_programs(1) * 3)
    report += (sample * tl.num_programs(1) + tl.program_id(1)) * 3 * HEADS + head
    tl.store(report, tl.sum(sums))
    tl.store(report + HEADS, tl.sum(sums_r))
    tl.store(report + 2 * HEADS, tl.sum(sums_a))


@triton.jit
def behind_second_kernel(
    grad, reduced, maps, known, factors, convolved, hidden, statistics, reduce, grad_second, found, samples, plane,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, CH: tl.constexpr, P: tl.constexpr,
    TILES: tl.constexpr, STORE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Pixel by pixel: the gradient D of the second BatchNorm's output, and its sums.

    Programs are (runs of tiles, chunks of H', groups).

    Args:
        factors: (G, 4, H), with the gradient of R, factors · (g, R, A, 1).
        convolved: C, (B, H', plane).
        statistics: see `refine_kernel_between`.
        reduce: (H, H').
        grad_second: D, (B, H', plane), written if STORE.
        found: (G, programs but for the chunks, H', H + 2): products of relu6(scale C + shift) with the gradient of R,
            the sum of D, and that of D (C - mean).
    """
    sample, first = tiles(plane, P, TILES)
    own = sample * HEADS * plane + first
    grad, reduced = of_group(grad, samples * HEADS * plane) + own, of_group(reduced, samples * HEADS * plane) + own
    maps, hidden = of_group(maps, samples * HEADS * plane) + own, of_group(hidden, 3 * HIDDEN)
    own = sample * HIDDEN * plane + first
    convolved = of_group(convolved, samples * HIDDEN * plane) + own
    grad_second = of_group(grad_second, samples * HIDDEN * plane) + own
    known, factors = of_group(known, 3 * HEADS), of_group(factors, 4 * HEADS)
    lane, heads, channels = tl.arange(0, P), tl.arange(0, HP), tl.program_id(1) * CH + tl.arange(0, CH)
    at_heads, at_channels = lane[None, :] + heads[:, None] * plane, lane[None, :] + channels[:, None] * plane
    mean_r, mean_a = column(known, heads, HEADS), column(known + HEADS, heads, HEADS)
    of_g, of_r = column(factors, heads, HEADS), column(factors + HEADS, heads, HEADS)
    of_a, of_one = column(factors + 2 * HEADS, heads, HEADS), column(factors + 3 * HEADS, heads, HEADS)
    k, b = column(hidden + HIDDEN, channels, HIDDEN), column(hidden + 2 * HIDDEN, channels, HIDDEN)
    m = column(of_group(statistics, 4 * HIDDEN + 4 * HEADS) + 2 * HIDDEN, channels, HIDDEN)
    back = tl.trans(matrix(reduce, heads, channels, HEADS, HIDDEN).to(maps.dtype.element_ty))
    sums = tl.zeros((CH, P), dtype=TYPE)
    moments = tl.zeros((CH, P), dtype=TYPE)
    products = tl.zeros((CH, HP), dtype=TYPE)
    for i in range(TILES):
        exists = first + i * P + lane < plane
        inside = exists[None, :] & (heads < HEADS)[:, None]
        g, r, a = at_pixels(grad + i * P, reduced + i * P, maps + i * P, at_heads, inside, mean_r, mean_a, TYPE)
        grad_r = tl.where(inside, of_g * g + of_r * r + of_a * a + of_one, 0.0).to(maps.dtype.element_ty)
        inside = exists[None, :] & (channels < HIDDEN)[:, None]
        c = tl.load((convolved + i * P) + at_channels, mask=inside, other=0.0).to(TYPE)
        x = clamped(k * c + b, 6.0)
        d = neighbours(product(back, grad_r, TYPE), 0, CH, P)
        d = tl.where((x <= 0) | (x >= 6), 0.0, d)
        if STORE:
            tl.store((grad_second + i * P) + at_channels, d.to(grad_second.dtype.element_ty), mask=inside)
        sums += d
        moments += d * (c - m)
        products += product(x.to(grad_r.dtype), tl.trans(grad_r), TYPE)
    report = of_group(found, tl.num_programs(0) * HIDDEN * (HEADS + 2))
    report += (tl.program_id(0) * HIDDEN + channels) * (HEADS + 2)
    there = channels < HIDDEN
    tl.store(report[:, None] + heads[None, :], products, mask=there[:, None] & (heads < HEADS)[None, :])
    tl.store(report + HEADS, tl.sum(sums, 1), mask=there)
    tl.store(report + HEADS + 1, tl.sum(moments, 1), mask=there)


@triton.jit
def deconvolve_kernel(
    maps, known, weights, hidden, kernel, convolved, grad_second, factors, grad_maps, found,
    samples, rows, columns, run,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Down the rows: from D to the maps, but for what the statistics of the first BatchNorm add.

    With dC = factors · (D, C, 1) and h = relu6(e), e the expanded maps: the gradient of h is the transposed convolution
    of dC, that of e is the same where 0 < e < 6, and that of A is weightsᵀ times this.

    Programs are (columns, runs of rows, groups). A program takes its chunks of H' one after the other and adds up
    their shares of `grad_maps` in place.

    Args:
        weights: as in `convolve_kernel`.
        factors: (G, 3, H').
        grad_maps: (B, H, rows, columns), written.
        found: (G, programs, H', H + 1 + K²): products of the gradient of e with A, its sum, and the gradient of
            `kernel`.
    """
    HALO: tl.constexpr = K // 2
    plane = rows * columns
    maps, grad_maps = of_group(maps, samples * HEADS * plane), of_group(grad_maps, samples * HEADS * plane)
    convolved = of_group(convolved, samples * HIDDEN * plane)
    grad_second = of_group(grad_second, samples * HIDDEN * plane)
    known, factors = of_group(known, 3 * HEADS), of_group(factors, 3 * HIDDEN)
    bias, expand = of_group(hidden, 3 * HIDDEN), of_group(weights, HIDDEN * HEADS)
    heads = tl.arange(0, HP)
    sample, x, exists, own = place(tl.program_id(0), samples, columns, HALO, P)
    inside = edges(x, columns, K, TYPE)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, rows)
    at_heads = (sample * HEADS * plane + x)[None, :] + (heads * plane)[:, None]
    maps += first * columns
    grad_maps += first * columns
    convolved += (first - HALO) * columns
    grad_second += (first - HALO) * columns
    real = own[None, :] & (heads < HEADS)[:, None]
    means, top = column(known + HEADS, heads, HEADS), tl.where(own, 6.0, 0.0).to(TYPE)[None, :]
    for start in range(0, HIDDEN, CH):
        channels = start + tl.arange(0, CH)
        there = channels < HIDDEN
        at_hidden = (sample * HIDDEN * plane + x)[None, :] + (channels * plane)[:, None]
        expansion, shift = matrix(expand, channels, heads, HIDDEN, HEADS), column(bias, channels, HIDDEN)
        weighting = taps(kernel, channels, HIDDEN, K)
        of_d, of_c = column(factors, channels, HIDDEN), column(factors + HIDDEN, channels, HIDDEN)
        of_one = column(factors + 2 * HIDDEN, channels, HIDDEN)
        values = zeros(K, CH, P, TYPE)  # of the rows that this one's dC reaches, from the one above on
        maps_above = zeros(K, HP, P, maps.dtype.element_ty)  # of the same rows
        sums = zeros(K, CH, P, TYPE)  # of their gradients
        grad_kernel = zeros(K * K, CH, P, TYPE)
        total = tl.zeros((CH, P), dtype=TYPE)
        moments = tl.zeros((CH, HP), dtype=TYPE)
        for i in range(last - first + 2 * HALO):
            below = first + i < last
            mask = real & (x < tl.where(below, columns, 0))[None, :]
            h, a = expanded((maps + i * columns) + at_heads, mask, means, expansion, shift, top, TYPE)
            h = h * tl.where(below, 1.0, 0.0).to(TYPE)
            values = pushed(values, neighbours(h, 0, CH, P), K)
            maps_above = pushed(maps_above, a, K)
            row = first - HALO + i
            within = (row >= 0) & (row < rows)
            mask = (exists & (x < tl.where(within, columns, 0)))[None, :] & there[:, None]
            d = tl.load((grad_second + i * columns) + at_hidden, mask=mask, other=0.0).to(TYPE)
            c = tl.load((convolved + i * columns) + at_hidden, mask=mask, other=0.0).to(TYPE)
            grad_c = of_d * d + of_c * c + of_one * tl.where(within, 1.0, 0.0).to(TYPE)
            for dx in tl.static_range(K):
                # Seen from where its gradient goes a tap lies on the other side.
                beside = neighbours(grad_c, HALO - dx, CH, P)
                if dx != HALO:
                    beside *= inside[K - 1 - dx]
                added = ()
                for dy in tl.static_range(K):
                    added = added + (sums[dy] + weighting[dy * K + dx] * beside,)
                sums = added
                products = ()
                for tap in tl.static_range(K * K):
                    if tap % K == dx:
                        products = products + (grad_kernel[tap] + values[tap // K] * beside,)
                    else:
                        products = products + (grad_kernel[tap],)
                grad_kernel = products
            if i >= 2 * HALO:
                outside = (values[0] <= 0) | (values[0] >= 6)
                grad_e = tl.where(outside, 0.0, sums[0])
                rounded = grad_e.to(maps.dtype.element_ty)
                total += rounded.to(TYPE)
                above = (i - 2 * HALO) * columns
                moments += product(rounded, tl.trans(maps_above[0]), TYPE)
                share = product(tl.trans(expansion), rounded, TYPE)
                if start > 0:
                    share += tl.load((grad_maps + above) + at_heads, mask=real, other=0.0).to(TYPE)
                tl.store((grad_maps + above) + at_heads, share.to(grad_maps.dtype.element_ty), mask=real)
            sums = pushed(sums, tl.zeros((CH, P), dtype=TYPE), K)
        sum_e = tl.sum(total, 1)
        if maps.dtype.element_ty.primitive_bitwidth == 16:
            # As in `expanded`: the maps were not centred.
            moments -= sum_e[:, None] * tl.trans(means)
        report = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * HIDDEN + channels
        record: tl.constexpr = HEADS + 1 + K * K
        programs = tl.num_programs(0) * tl.num_programs(1)
        report = of_group(found, programs * HIDDEN * record) + report * record
        tl.store(report[:, None] + heads[None, :], moments, mask=there[:, None] & (heads < HEADS)[None, :])
        tl.store(report + HEADS, sum_e, mask=there)
        for tap in tl.static_range(K * K):
            tl.store(report + HEADS + 1 + tap, tl.sum(grad_kernel[tap], 1), mask=there)
        # What one thread wrote to `grad_maps`, another may read for the next chunk.
        tl.debug_barrier()


@triton.jit
def finish_kernel(
    grad, reduced, maps, known, factors, mixed, grad_maps, samples, plane,
    HEADS: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Pixel by pixel: add to `grad_maps` what is linear, factors · (g, R, A, 1) - mixed A.

    Args:
        factors: (G, 4, H).
        mixed: (G, H, H), in the type of the maps.
        grad_maps: (B, H, plane).
    """
    sample, first = tiles(plane, P, TILES)
    own = sample * HEADS * plane + first
    grad, reduced = of_group(grad, samples * HEADS * plane) + own, of_group(reduced, samples * HEADS * plane) + own
    maps, grad_maps = of_group(maps, samples * HEADS * plane) + own, of_group(grad_maps, samples * HEADS * plane) + own
    known, factors = of_group(known, 3 * HEADS), of_group(factors, 4 * HEADS)
    lane, heads = tl.arange(0, P), tl.arange(0, HP)
    offsets = lane[None, :] + heads[:, None] * plane
    mean_r, mean_a = column(known, heads, HEADS), column(known + HEADS, heads, HEADS)
    of_g, of_r = column(factors, heads, HEADS), column(factors + HEADS, heads, HEADS)
    of_a, of_one = column(factors + 2 * HEADS, heads, HEADS), column(factors + 3 * HEADS, heads, HEADS)
    weights = matrix(of_group(mixed, HEADS * HEADS), heads, heads, HEADS, HEADS)
    for i in range(TILES):
        inside = (first + i * P + lane < plane)[None, :] & (heads < HEADS)[:, None]
        g, r, a = at_pixels(grad + i * P, reduced + i * P, maps + i * P, offsets, inside, mean_r, mean_a, TYPE)
        x = tl.load((grad_maps + i * P) + offsets, mask=inside, other=0.0).to(TYPE)
        x += of_g * g + of_r * r + of_a * a + of_one
        x -= neighbours(product(weights, a.to(maps.dtype.element_ty), TYPE), 0, HP, P)
        tl.store((grad_maps + i * P) + offsets, x.to(grad_maps.dtype.element_ty), mask=inside)
