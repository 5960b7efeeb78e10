"""The Triton kernels behind `refine_fused`, forward; what all of them share is in `refine_kernel_parts`.

All maps of a pixel are a column of a matrix, so that the 1x1 convolutions are products on tensor cores, and pixels lie
side by side along the other axis. Kernels come in two forms:

* Down the rows: a program takes `P` columns of the maps, which may belong to neighbouring samples, and walks down `run`
  rows. It computes the expanded maps of a row once, hands them to the neighbouring columns (a warp's threads hold a
  row's columns, so this is a shuffle) and adds them to the rows that they reach. Its outermost columns are halo.
* Pixel by pixel, where pixels don't meet: a program takes `TILES` times `P` of them, in the order of memory.

The third axis of programs counts groups of BatchNorm statistics, each of `samples` samples: groups share no numbers,
and what a group computes doesn't depend on how many there are.

Statistics are taken as they pass by, by Welford's method in every thread, then merged (Chan et al.): maps vary little
around their mean. Each program writes a record of what it found, and `refine_kernel_between` merges these in a fixed
order.

Shapes: B samples of G groups, H heads, H' expanded maps, `rows` x `columns` pixels. Vectors are (H,) or (H',), in
`TYPE`: float32, float64 for float64. Products are of the type of the maps and summed in `TYPE`. `known` (G, 3, H) has
in [0] and [1] the means of the reduced maps and of the maps; `hidden` (G, 3, H') in [0] what `expanded` adds, in [1]
and [2] the second BatchNorm as scale C + shift.

Constants: `HEADS` and `HIDDEN` are H and H'; `HP` is H with padding to a size that products take; `CH` of the H' are
computed at a time; `K` is the side of the local kernel.
"""

# Triton grows tuples by adding others and has no starred entries.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.models.refine_kernel_parts import (
    centered,
    clamped,
    column,
    edges,
    expanded,
    matrix,
    merged,
    neighbours,
    number,
    of_group,
    pixel,
    place,
    product,
    pushed,
    taps,
    zeros,
)


@triton.jit
def covariance_kernel(
    maps, found, samples, plane,
    HEADS: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Means and covariances of the maps, (B, H, plane).

    Args:
        found: (G, programs, 1 + H + H²): number of a program's pixels, means, and products of the differences from
            these. In half precision they are rounded as differences from the means of the first tile, as flat maps
            have few digits of their own to tell them apart.
    """
    maps = of_group(maps, samples * HEADS * plane)
    heads = tl.arange(0, HP)
    sample, at, exists = pixel(tl.program_id(0) * TILES, samples, plane, P)
    offsets = (sample * HEADS * plane + at)[None, :] + heads[:, None] * plane
    values = tl.load(maps + offsets, mask=exists[None, :] & (heads < HEADS)[:, None], other=0.0).to(TYPE)
    near = (tl.sum(values, 1) / tl.sum(exists.to(TYPE), 0))[:, None]
    sums = tl.zeros((HP, P), dtype=TYPE)
    products = tl.zeros((HP, HP), dtype=TYPE)
    n = tl.zeros((P,), dtype=TYPE)
    for i in range(TILES):
        sample, at, exists = pixel(tl.program_id(0) * TILES + i, samples, plane, P)
        offsets = (sample * HEADS * plane + at)[None, :] + heads[:, None] * plane
        x = centered(maps, offsets, exists[None, :] & (heads < HEADS)[:, None], near, TYPE)
        sums += x.to(TYPE)
        n += exists.to(TYPE)
        products += product(x, tl.trans(x), TYPE)
    count = tl.sum(n, 0)
    away = tl.sum(sums, 1) / count
    mean = tl.sum(near, 1) + away
    products -= count * away[:, None] * away[None, :]
    report = of_group(found, tl.num_programs(0) * (1 + HEADS + HEADS * HEADS))
    report += tl.program_id(0) * (1 + HEADS + HEADS * HEADS)
    tl.store(report, count)
    tl.store(report + 1 + heads, mean, mask=heads < HEADS)
    target = report + 1 + HEADS + heads[:, None] * HEADS + heads[None, :]
    tl.store(target, products, mask=(heads < HEADS)[:, None] & (heads < HEADS)[None, :])


@triton.jit
def convolve_kernel(
    maps, known, weights, hidden, kernel, convolved, found, samples, rows, columns, run,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    STORE: tl.constexpr, SUM: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Down the rows: what goes into the second BatchNorm, C = local(relu6(expanded maps)).

    Programs are (columns x chunks of H', which so share what they read, runs of rows, groups).

    Args:
        weights: (G, H', H) in the type of the maps, of the expansion with the first BatchNorm's scale.
        convolved: (B, H', rows, columns), written if STORE.
        found: (G, programs but for the chunks, 3, H'): number, mean and squared differences of C, written if SUM.
    """
    plane = rows * columns
    maps, convolved = of_group(maps, samples * HEADS * plane), of_group(convolved, samples * HIDDEN * plane)
    known, hidden = of_group(known, 3 * HEADS), of_group(hidden, 3 * HIDDEN)
    HALO: tl.constexpr = K // 2
    CHUNKS: tl.constexpr = (HIDDEN + CH - 1) // CH
    tile = tl.program_id(0) // CHUNKS
    heads, channels = tl.arange(0, HP), tl.program_id(0) % CHUNKS * CH + tl.arange(0, CH)
    sample, x, exists, own = place(tile, samples, columns, HALO, P)
    inside = edges(x, columns, K, TYPE)
    means, shift = column(known + HEADS, heads, HEADS), column(hidden, channels, HIDDEN)
    expansion = matrix(of_group(weights, HIDDEN * HEADS), channels, heads, HIDDEN, HEADS)
    weighting = taps(kernel, channels, HIDDEN, K)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, rows)
    source = (sample * HEADS * plane + x)[None, :] + (heads * plane)[:, None]
    target = (sample * HIDDEN * plane + x)[None, :] + (channels * plane)[:, None]
    maps += (first - HALO) * columns
    convolved += first * columns

    mean = tl.zeros((CH, P), dtype=TYPE)
    spread = tl.zeros((CH, P), dtype=TYPE)
    sums = zeros(K, CH, P, TYPE)  # of the rows that this one reaches, from the one above on
    for i in range(last - first + 2 * HALO):
        row = first - HALO + i
        there = (row >= 0) & (row < rows)
        mask = (exists & (x < tl.where(there, columns, 0)))[None, :] & (heads < HEADS)[:, None]
        values, _ = expanded(maps + source, mask, means, expansion, shift, tl.where(there, 6.0, 0.0).to(TYPE), TYPE)
        for dx in tl.static_range(K):
            beside = neighbours(values, dx - HALO, CH, P)
            if dx != HALO:
                beside *= inside[dx]
            added = ()
            for reached in tl.static_range(K):
                added = added + (sums[reached] + weighting[(K - 1 - reached) * K + dx] * beside,)
            sums = added
        if i >= 2 * HALO:
            if SUM:
                away = sums[0] - mean
                mean += away * (1.0 / number(i - 2 * HALO + 1, TYPE))
                spread += away * (sums[0] - mean)
            if STORE:
                stored = own[None, :] & (channels < HIDDEN)[:, None]
                tl.store(convolved + target, sums[0].to(convolved.dtype.element_ty), mask=stored)
            convolved += columns
        sums = pushed(sums, tl.zeros((CH, P), dtype=TYPE), K)
        maps += columns
    if SUM:
        n = tl.where(own, (last - first).to(TYPE), 0.0)[None, :]
        of_all, squares = merged(mean, spread, n)
        programs = tl.num_programs(0) // CHUNKS * tl.num_programs(1)
        report = of_group(found, programs * 3 * HIDDEN) + channels
        report += (tile * tl.num_programs(1) + tl.program_id(1)) * 3 * HIDDEN
        tl.store(report, tl.sum(n, 1) + tl.zeros((CH,), dtype=TYPE), mask=channels < HIDDEN)
        tl.store(report + HIDDEN, of_all, mask=channels < HIDDEN)
        tl.store(report + 2 * HIDDEN, squares, mask=channels < HIDDEN)


@triton.jit
def reduce_kernel(
    convolved, maps, known, hidden, reduce, reduced, found, samples, plane,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, CH: tl.constexpr, P: tl.constexpr,
    TILES: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Pixel by pixel: R = reduce relu6(scale C + shift), and what the statistics of R and of k R + A need.

    Args:
        convolved: C, (B, H', plane).
        reduce: (H, H').
        reduced: R, (B, H, plane).
        found: (G, programs, 5, H): number, mean and squared differences of R, mean of A less that of the maps, products
            of the differences of both.
    """
    maps, reduced = of_group(maps, samples * HEADS * plane), of_group(reduced, samples * HEADS * plane)
    convolved, hidden = of_group(convolved, samples * HIDDEN * plane), of_group(hidden, 3 * HIDDEN)
    heads = tl.arange(0, HP)
    means = column(of_group(known, 3 * HEADS) + HEADS, heads, HEADS)
    mean = tl.zeros((HP, P), dtype=TYPE)
    spread = tl.zeros((HP, P), dtype=TYPE)
    other = tl.zeros((HP, P), dtype=TYPE)
    common = tl.zeros((HP, P), dtype=TYPE)
    n = tl.zeros((1, P), dtype=TYPE)
    scales, shifts, weights = (), (), ()  # in registers: the loop's loads would follow its stores
    for start in tl.static_range(0, HIDDEN, CH):
        channels = start + tl.arange(0, CH)
        scales = scales + (column(hidden + HIDDEN, channels, HIDDEN),)
        shifts = shifts + (column(hidden + 2 * HIDDEN, channels, HIDDEN),)
        weights = weights + (matrix(reduce, heads, channels, HEADS, HIDDEN).to(maps.dtype.element_ty),)
    for i in range(TILES):
        sample, at, exists = pixel(tl.program_id(0) * TILES + i, samples, plane, P)
        out = tl.zeros((HP, P), dtype=TYPE)
        for chunk in tl.static_range((HIDDEN + CH - 1) // CH):
            channels = chunk * CH + tl.arange(0, CH)
            offsets = (sample * HIDDEN * plane + at)[None, :] + channels[:, None] * plane
            c = tl.load(convolved + offsets, mask=exists[None, :] & (channels < HIDDEN)[:, None], other=0.0)
            x = clamped(scales[chunk] * c.to(TYPE) + shifts[chunk], 6.0)
            out += product(weights[chunk], x.to(c.dtype), TYPE)
        rounded = out.to(reduced.dtype.element_ty)
        offsets = (sample * HEADS * plane + at)[None, :] + heads[:, None] * plane
        inside = exists[None, :] & (heads < HEADS)[:, None]
        tl.store(reduced + offsets, rounded, mask=inside)
        a = centered(maps, offsets, inside, means, TYPE).to(TYPE)
        n += exists[None, :].to(TYPE)
        share = tl.where(exists, 1.0, 0.0).to(TYPE)[None, :] / (i + 1)
        away, other_away = rounded.to(TYPE) - mean, a - other
        mean += away * share
        other += other_away * share
        spread += tl.where(exists[None, :], away * (rounded.to(TYPE) - mean), 0.0)
        common += tl.where(exists[None, :], away * (a - other), 0.0)
    of_all, squares = merged(mean, spread, n)
    of_maps = tl.sum(n * other, 1) / tl.sum(n, 1)
    products = tl.sum(common + n * (mean - of_all[:, None]) * (other - of_maps[:, None]), 1)
    report = of_group(found, tl.num_programs(0) * 5 * HEADS) + tl.program_id(0) * 5 * HEADS + heads
    tl.store(report, tl.sum(n, 1) + tl.zeros((HP,), dtype=TYPE), mask=heads < HEADS)
    tl.store(report + HEADS, of_all, mask=heads < HEADS)
    tl.store(report + 2 * HEADS, squares, mask=heads < HEADS)
    tl.store(report + 3 * HEADS, of_maps, mask=heads < HEADS)
    tl.store(report + 4 * HEADS, products, mask=heads < HEADS)


@triton.jit
def combine_kernel(
    reduced, maps, known, factors, out, plane,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """out = factors · (R, A, 1), all (B, H, plane), R and A less their means; programs are (maps, runs, groups).

    Args:
        factors: (G, 3, H).
    """
    head = tl.program_id(0) % HEADS
    known, factors = of_group(known, 3 * HEADS) + head, of_group(factors, 3 * HEADS) + head
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    offsets = (of_group(0, tl.num_programs(0)) + tl.program_id(0)) * plane + at
    r = tl.load(reduced + offsets, mask=at < plane, other=0.0).to(TYPE) - tl.load(known)
    a = tl.load(maps + offsets, mask=at < plane, other=0.0).to(TYPE) - tl.load(known + HEADS)
    x = tl.load(factors) * r + tl.load(factors + HEADS) * a + tl.load(factors + 2 * HEADS)
    tl.store(out + offsets, x.to(out.dtype.element_ty), mask=at < plane)
