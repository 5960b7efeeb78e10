"""The Triton kernels behind `refine_fused`, forward; what all of them share is in `refine_kernel_parts`.

All maps of a pixel are a column of a matrix, so that the 1x1 convolutions are products on tensor cores, and pixels lie
side by side along the other axis. Kernels come in three forms:

* Pixel by pixel, where pixels don't meet: a program takes `TILES` times `P` of a sample, in the order of memory.
* Down the rows, by lines: a program takes `WIDTH` columns in `LINES` places of the maps at once and walks down `run`
  rows of each. The local convolution of a map is then a product of matrices, on tensor cores too (`convolve_kernel`).
* Down the rows, by columns: a program takes `P` columns, which may belong to neighbouring samples. It computes the
  expanded maps of a row once, hands them to the neighbouring columns (a warp's threads hold a row's columns, so this is
  a shuffle) and adds them to the rows that they reach. This takes the fewest registers (`deconvolve_kernel`).

Where pixels meet, the outermost columns of a program are halo.

The third axis of programs counts groups of BatchNorm statistics, each of `samples` samples: groups share no numbers,
and what a group computes doesn't depend on how many there are.

Statistics are taken as they pass by, by Welford's method or from a value near the mean, then merged (Chan et al.): maps
vary little around their mean. Each program writes a record of what it found, and `refine_kernel_between` merges these
in a fixed order.

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
    band,
    beside,
    centered,
    clamped,
    column,
    expanded,
    line,
    matrix,
    merged,
    of_group,
    product,
    pushed,
    tiles,
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
    heads, lane = tl.arange(0, HP), tl.arange(0, P)
    sample, first = tiles(plane, P, TILES)
    maps = of_group(maps, samples * HEADS * plane) + sample * HEADS * plane + first
    offsets, exists = lane[None, :] + heads[:, None] * plane, first + lane < plane
    values = tl.load(maps + offsets, mask=exists[None, :] & (heads < HEADS)[:, None], other=0.0).to(TYPE)
    near = (tl.sum(values, 1) / tl.sum(exists.to(TYPE), 0))[:, None]
    sums = tl.zeros((HP, P), dtype=TYPE)
    products = tl.zeros((HP, HP), dtype=TYPE)
    n = tl.zeros((P,), dtype=TYPE)
    for i in range(TILES):
        exists = first + i * P + lane < plane
        x = centered(maps + i * P, offsets, exists[None, :] & (heads < HEADS)[:, None], near, TYPE)
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
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr, STORE: tl.constexpr, SUM: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Down the rows: what goes into the second BatchNorm, C = local(relu6(expanded maps)).

    A program takes `LINES` runs of rows, of the same sample or others, and `WIDTH` columns of each, the outermost of
    which are halo. Each row's expanded maps are then, for one of the H', a matrix (lines, columns), and so are the rows
    above and below: C is the sum of their products with matrices that have the local kernel's rows as their bands.

    Programs are (columns x chunks of H', which so share what they read, lines, groups).

    Args:
        weights: (G, H', H) in the type of the maps, of the expansion with the first BatchNorm's scale.
        convolved: (B, H', rows, columns), written if STORE.
        found: (G, programs but for the chunks, 3, H'): number, mean and squared differences of C, written if SUM.
    """
    HALO: tl.constexpr = K // 2
    CHUNKS: tl.constexpr = (HIDDEN + CH - 1) // CH
    DTYPE: tl.constexpr = maps.dtype.element_ty
    plane = rows * columns
    maps, convolved = of_group(maps, samples * HEADS * plane), of_group(convolved, samples * HIDDEN * plane)
    known, hidden = of_group(known, 3 * HEADS), of_group(hidden, 3 * HIDDEN)
    heads, channels = tl.arange(0, HP), tl.program_id(0) % CHUNKS * CH + tl.arange(0, CH)
    tile = tl.program_id(0) // CHUNKS
    left, above = tile * (WIDTH - 2 * HALO) - HALO, tl.program_id(1) * LINES
    means, shift = column(known + HEADS, heads, HEADS), column(hidden, channels, HIDDEN)
    expansion = matrix(of_group(weights, HIDDEN * HEADS), channels, heads, HIDDEN, HEADS)
    # Pixels one behind the other, as they are expanded.
    index = tl.arange(0, LINES * WIDTH)
    sample, first = line(above + index // WIDTH, rows, run)
    x = left + index % WIDTH
    exists = (sample < samples) & (x >= 0) & (x < columns)
    source = (sample * HEADS * plane + (first - HALO) * columns + x)[None, :] + (heads * plane)[:, None]
    # Lines and columns, as they are convolved.
    lane, hidden_map = tl.arange(0, WIDTH)[None, None, :], channels[:, None, None]
    to_sample, to_first = line(above + tl.arange(0, LINES)[None, :, None], rows, run)
    own = (to_sample < samples) & (lane >= HALO) & (lane < WIDTH - HALO) & (left + lane < columns)
    height = tl.where(own, tl.minimum(run, rows - to_first), 0)
    target = to_sample * HIDDEN * plane + to_first * columns + left + lane
    bands, window = (), ()  # and the rows that this one meets, from the one above on
    for dy in tl.static_range(K):
        bands = bands + (band(kernel, channels, dy, HIDDEN, K, WIDTH).to(DTYPE),)
        window = window + (tl.zeros((CH, LINES, WIDTH), dtype=DTYPE),)
    if SUM:
        # Differences from what C is where all maps have their mean: close enough that sums of squares lose nothing.
        middle = shift
        if DTYPE.primitive_bitwidth == 16:
            middle += tl.sum(expansion.to(TYPE) * tl.trans(means), 1)[:, None]
        tap = tl.arange(0, KP)[None, :]
        inside = (tap < K * K) & (channels < HIDDEN)[:, None]
        taps = tl.load(kernel + channels[:, None] * (K * K) + tap, mask=inside, other=0.0)
        near = tl.sum(clamped(middle, 6.0) * taps, 1)
        sums = tl.zeros((CH, LINES, 4), dtype=TYPE)
        squares = tl.zeros((CH, LINES, 4), dtype=TYPE)
    for i in range(run + 2 * HALO):
        row = first - HALO + i
        there = exists & (row >= 0) & (row < rows)
        mask = there[None, :] & (heads < HEADS)[:, None]
        top = tl.where(there, 6.0, 0.0).to(TYPE)[None, :]
        values, _ = expanded(maps + source, mask, means, expansion, shift, top, TYPE)
        window = pushed(window, values.to(DTYPE).reshape(CH, LINES, WIDTH), K)
        if i >= 2 * HALO:
            c = tl.zeros((CH, LINES, WIDTH), dtype=TYPE)
            for dy in tl.static_range(K):
                c = tl.dot(window[dy], bands[dy], c, input_precision="ieee", out_dtype=TYPE)
            stored = i - 2 * HALO < height
            if STORE:
                # By this choice the compiler doesn't hold an address for each pixel in registers.
                to = tl.where(stored, target, 0) + hidden_map * plane
                tl.store(convolved + to, c.to(DTYPE), mask=stored & (hidden_map < HIDDEN))
            if SUM:
                away = tl.where(stored, c - near[:, None, None], 0.0)
                sums += beside(away, CH, LINES, WIDTH)
                squares += beside(away * away, CH, LINES, WIDTH)
            convolved += columns
        maps += columns
    if SUM:
        n = tl.sum(tl.sum(height, 2), 1).to(TYPE) + tl.zeros((CH,), dtype=TYPE)
        away = tl.sum(tl.sum(sums, 2), 1)
        spread = tl.sum(tl.sum(squares, 2), 1) - away * away / n
        spread = tl.maximum(spread, 0.0, propagate_nan=tl.PropagateNan.ALL)
        programs = tl.num_programs(0) // CHUNKS * tl.num_programs(1)
        report = of_group(found, programs * 3 * HIDDEN) + channels
        report += (tile * tl.num_programs(1) + tl.program_id(1)) * 3 * HIDDEN
        tl.store(report, n, mask=channels < HIDDEN)
        tl.store(report + HIDDEN, near + away / n, mask=channels < HIDDEN)
        tl.store(report + 2 * HIDDEN, spread, mask=channels < HIDDEN)


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
    sample, first = tiles(plane, P, TILES)
    own = sample * HEADS * plane + first
    maps, reduced = of_group(maps, samples * HEADS * plane) + own, of_group(reduced, samples * HEADS * plane) + own
    convolved = of_group(convolved, samples * HIDDEN * plane) + sample * HIDDEN * plane + first
    hidden = of_group(hidden, 3 * HIDDEN)
    heads, lane = tl.arange(0, HP), tl.arange(0, P)
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
        exists = first + i * P + lane < plane
        out = tl.zeros((HP, P), dtype=TYPE)
        for chunk in tl.static_range((HIDDEN + CH - 1) // CH):
            channels = chunk * CH + tl.arange(0, CH)
            offsets = lane[None, :] + channels[:, None] * plane
            c = tl.load((convolved + i * P) + offsets, mask=exists[None, :] & (channels < HIDDEN)[:, None], other=0.0)
            x = clamped(scales[chunk] * c.to(TYPE) + shifts[chunk], 6.0)
            out += product(weights[chunk], x.to(c.dtype), TYPE)
        rounded = out.to(reduced.dtype.element_ty)
        offsets = lane[None, :] + heads[:, None] * plane
        inside = exists[None, :] & (heads < HEADS)[:, None]
        tl.store((reduced + i * P) + offsets, rounded, mask=inside)
        a = centered(maps + i * P, offsets, inside, means, TYPE).to(TYPE)
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
