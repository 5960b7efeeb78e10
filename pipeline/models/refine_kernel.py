"""The Triton kernels behind `refine_fused`, forward, and what those of the backward pass share with them.

All maps of a pixel are a column of a matrix, so that the 1x1 convolutions are products on tensor cores, and pixels lie
side by side along the other axis. Kernels come in two forms:

* Down the rows: a program takes `P` columns of the maps, which may belong to neighbouring samples, and walks down `run`
  rows. It computes the expanded maps of a row once, hands them to the neighbouring columns (a warp's threads hold a
  row's columns, so this is a shuffle) and adds them to the rows that they reach. Its outermost columns are halo.
* Pixel by pixel, where pixels don't meet: a program takes `TILES` times `P` of them, in the order of memory.

Statistics are taken as they pass by, by Welford's method in every thread, then merged (Chan et al.): maps vary little
around their mean. Each program writes what it found, and PyTorch sums this, so the order never changes.

Shapes: B samples, H heads, H' expanded maps, `rows` x `columns` pixels. Vectors are (H,) or (H',), in `TYPE`: float32,
float64 for float64. Products are of the type of the maps and summed in `TYPE`.

Constants: `HEADS` and `HIDDEN` are H and H'; `HP` is H with padding to a size that products take; `CH` of the H' are
computed at a time; `K` is the side of the local kernel.
"""

# Triton grows tuples by adding others and has no starred entries.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column(vector, index, COUNT: tl.constexpr):
    """Of a vector, beside pixels: (n, 1), 0 from COUNT on."""
    return tl.load(vector + index, mask=index < COUNT, other=0.0)[:, None]


@triton.jit
def matrix(values, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a contiguous (ROWS, COLUMNS): those rows and columns, 0 outside."""
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(values + rows[:, None] * COLUMNS + columns[None, :], mask=inside, other=0.0)


@triton.jit
def product(a, b, TYPE: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee", out_dtype=TYPE)


@triton.jit
def centered(maps, offsets, inside, center, TYPE: tl.constexpr):
    """Maps less their means, in the type of the maps, and 0 outside."""
    x = tl.load(maps + offsets, mask=inside, other=0.0)
    return tl.where(inside, x.to(TYPE) - center, 0.0).to(x.dtype)


@triton.jit
def clamped(x, top):
    """ReLU6 for a top of 6."""
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, top, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def expanded(maps, mask, center, weights, shift, top, TYPE: tl.constexpr):
    """The expanded maps behind the first ReLU6, (CH, P).

    In half precision the maps are not centred: products are exact and summed in float32, so `shift` can do it.

    Args:
        maps, mask: where to read them and whether to, (HP, P).
        top: 6 where a pixel lies in the maps and 0 outside, or one of them for all.
    """
    x = tl.load(maps, mask=mask, other=0.0)
    if x.dtype.primitive_bitwidth > 16:
        x = x - center
    return clamped(product(weights, x, TYPE) + shift, top)


@triton.jit
def merged(mean, spread, n):
    """Mean and sum of squared differences over pixels, from those of each: (C, P) twice and (1, P) -> (C,) twice."""
    of_all = (tl.sum(n * mean, 1) / tl.sum(n, 1))[:, None]
    away = mean - of_all
    return tl.sum(of_all, 1), tl.sum(tl.where(n > 0, spread + n * away * away, 0.0), 1)


@triton.jit
def place(tile, samples, columns, HALO: tl.constexpr, P: tl.constexpr):
    """Of the P columns of a program that goes down rows: sample, column within the map, whether it exists, and whether
    it is the program's own; `HALO` on either side are the neighbours'."""
    lane = tl.arange(0, P)
    index = tile * (P - 2 * HALO) + lane - HALO
    exists = (index >= 0) & (index < samples * columns)
    return index // columns, index % columns, exists, exists & (lane >= HALO) & (lane < P - HALO)


@triton.jit
def edges(x, columns, K: tl.constexpr, TYPE: tl.constexpr):
    """1 where the map has a column at each of the K horizontal shifts, from the leftmost on, else 0: K times (1, P)."""
    out = ()
    for dx in tl.static_range(K):
        beside = x + dx - K // 2
        out = out + (tl.where((beside >= 0) & (beside < columns), 1.0, 0.0).to(TYPE)[None, :],)
    return out


@triton.jit
def neighbours(values, DX: tl.constexpr, A: tl.constexpr, P: tl.constexpr):
    """Of (A, P) the columns DX to the right; at the ends of the tile anything.

    For DX = 0 nothing changes but which thread holds what: one column of pixels each, as they are loaded. Where
    products meet loaded pixels this keeps the compiler from going back and forth.
    """
    lane = tl.minimum(tl.maximum(tl.arange(0, P) + DX, 0), P - 1)
    return tl.gather(values, tl.broadcast_to(lane[None, :], (A, P)), 1)


@triton.jit
def pixel(tile, samples, plane, P: tl.constexpr):
    """Of the P pixels of a tile: sample, place within the map, whether it exists."""
    index = tile * P + tl.arange(0, P)
    return index // plane, index % plane, index < samples * plane


@triton.jit
def pushed(values, value, COUNT: tl.constexpr):
    """A tuple of COUNT without its first entry and with another at its end."""
    out = ()
    for i in tl.static_range(COUNT - 1):
        out = out + (values[i + 1],)
    return out + (value,)


@triton.jit
def zeros(COUNT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, TYPE: tl.constexpr):
    """A tuple of COUNT matrices (A, B)."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((A, B), dtype=TYPE),)
    return out


@triton.jit
def taps(kernel, channels, HIDDEN: tl.constexpr, K: tl.constexpr):
    """The local kernels' weights as a tuple of (CH, 1), row by row."""
    out = ()
    for i in tl.static_range(K * K):
        weight = tl.load(kernel + channels * K * K + i, mask=channels < HIDDEN, other=0.0)
        out = out + (weight[:, None],)
    return out


@triton.jit
def covariance_kernel(
    maps, center, found, samples, plane,
    HEADS: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Products of the centred maps, summed over the pixels of a program: (B, H, plane) -> found (programs, H, H)."""
    heads = tl.arange(0, HP)
    means = column(center, heads, HEADS)
    sums = tl.zeros((HP, HP), dtype=TYPE)
    for i in range(TILES):
        sample, at, exists = pixel(tl.program_id(0) * TILES + i, samples, plane, P)
        offsets = (sample * HEADS * plane + at)[None, :] + heads[:, None] * plane
        x = centered(maps, offsets, exists[None, :] & (heads < HEADS)[:, None], means, TYPE)
        sums += product(x, tl.trans(x), TYPE)
    target = found + tl.program_id(0) * HEADS * HEADS + heads[:, None] * HEADS + heads[None, :]
    tl.store(target, sums, mask=(heads < HEADS)[:, None] & (heads < HEADS)[None, :])


@triton.jit
def convolve_kernel(
    maps, center, expand, bias, kernel, convolved, found, samples, rows, columns, run,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    STORE: tl.constexpr, SUM: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Down the rows: what goes into the second BatchNorm, C = local(relu6(expand A + bias)).

    Programs are (columns x chunks of H', which so share what they read, runs of rows).

    Args:
        expand, bias: (H', H) in the type of the maps, with the first BatchNorm's scale, and (H',); see `expanded` for
            what is centred.
        convolved: (B, H', rows, columns), written if STORE.
        found: (3, programs but for the chunks, H'): number, mean and squared differences of C, written if SUM.
    """
    HALO: tl.constexpr = K // 2
    CHUNKS: tl.constexpr = (HIDDEN + CH - 1) // CH
    tile = tl.program_id(0) // CHUNKS
    heads, channels = tl.arange(0, HP), tl.program_id(0) % CHUNKS * CH + tl.arange(0, CH)
    sample, x, exists, own = place(tile, samples, columns, HALO, P)
    plane = rows * columns
    inside = edges(x, columns, K, TYPE)
    means, weights = column(center, heads, HEADS), matrix(expand, channels, heads, HIDDEN, HEADS)
    shift, weighting = column(bias, channels, HIDDEN), taps(kernel, channels, HIDDEN, K)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, rows)
    here = maps + (sample * HEADS * plane + x)[None, :] + (heads * plane + (first - HALO) * columns)[:, None]
    target = convolved + (sample * HIDDEN * plane + x)[None, :] + (channels * plane + first * columns)[:, None]

    mean = tl.zeros((CH, P), dtype=TYPE)
    spread = tl.zeros((CH, P), dtype=TYPE)
    sums = zeros(K, CH, P, TYPE)  # of the rows that this one reaches, from the one above on
    for i in range(last - first + 2 * HALO):
        row = first - HALO + i
        there = (row >= 0) & (row < rows)
        mask = (exists & (x < tl.where(there, columns, 0)))[None, :] & (heads < HEADS)[:, None]
        hidden = expanded(here, mask, means, weights, shift, tl.where(there, 6.0, 0.0).to(TYPE), TYPE)
        for dx in tl.static_range(K):
            beside = neighbours(hidden, dx - HALO, CH, P)
            if dx != HALO:
                beside *= inside[dx]
            added = ()
            for reached in tl.static_range(K):
                added = added + (sums[reached] + weighting[(K - 1 - reached) * K + dx] * beside,)
            sums = added
        if i >= 2 * HALO:
            if SUM:
                away = sums[0] - mean
                mean += away / (i - 2 * HALO + 1)
                spread += away * (sums[0] - mean)
            if STORE:
                stored = own[None, :] & (channels < HIDDEN)[:, None]
                tl.store(target, sums[0].to(convolved.dtype.element_ty), mask=stored)
            target += columns
        sums = pushed(sums, tl.zeros((CH, P), dtype=TYPE), K)
        here += columns
    if SUM:
        n = tl.where(own, (last - first).to(TYPE), 0.0)[None, :]
        of_all, squares = merged(mean, spread, n)
        programs = tl.num_programs(0) // CHUNKS * tl.num_programs(1)
        report = found + (tile * tl.num_programs(1) + tl.program_id(1)) * HIDDEN + channels
        tl.store(report, tl.sum(n, 1) + tl.zeros((CH,), dtype=TYPE), mask=channels < HIDDEN)
        tl.store(report + programs * HIDDEN, of_all, mask=channels < HIDDEN)
        tl.store(report + 2 * programs * HIDDEN, squares, mask=channels < HIDDEN)


@triton.jit
def reduce_kernel(
    convolved, maps, center, scale, shift, reduce, reduced, found, samples, plane,
    HEADS: tl.constexpr, HP: tl.constexpr, HIDDEN: tl.constexpr, CH: tl.constexpr, P: tl.constexpr,
    TILES: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Pixel by pixel: R = reduce relu6(scale C + shift), and what the statistics of R and of k R + A need.

    Args:
        convolved: C, (B, H', plane).
        reduce: (H, H'), in the type of the maps.
        reduced: R, (B, H, plane).
        found: (5, programs, H): number, mean and squared differences of R, mean of A - center, products of the
            differences of both.
    """
    heads = tl.arange(0, HP)
    means = column(center, heads, HEADS)
    mean = tl.zeros((HP, P), dtype=TYPE)
    spread = tl.zeros((HP, P), dtype=TYPE)
    other = tl.zeros((HP, P), dtype=TYPE)
    common = tl.zeros((HP, P), dtype=TYPE)
    n = tl.zeros((1, P), dtype=TYPE)
    scales, shifts, weights = (), (), ()  # in registers: the loop's loads would follow its stores
    for start in tl.static_range(0, HIDDEN, CH):
        channels = start + tl.arange(0, CH)
        scales = scales + (column(scale, channels, HIDDEN),)
        shifts = shifts + (column(shift, channels, HIDDEN),)
        weights = weights + (matrix(reduce, heads, channels, HEADS, HIDDEN),)
    for i in range(TILES):
        sample, at, exists = pixel(tl.program_id(0) * TILES + i, samples, plane, P)
        out = tl.zeros((HP, P), dtype=TYPE)
        for chunk in tl.static_range((HIDDEN + CH - 1) // CH):
            channels = chunk * CH + tl.arange(0, CH)
            offsets = (sample * HIDDEN * plane + at)[None, :] + channels[:, None] * plane
            c = tl.load(convolved + offsets, mask=exists[None, :] & (channels < HIDDEN)[:, None], other=0.0)
            hidden = clamped(scales[chunk] * c.to(TYPE) + shifts[chunk], 6.0)
            out += product(weights[chunk], hidden.to(c.dtype), TYPE)
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
    step = tl.num_programs(0) * HEADS
    report = found + tl.program_id(0) * HEADS + heads
    tl.store(report, tl.sum(n, 1) + tl.zeros((HP,), dtype=TYPE), mask=heads < HEADS)
    tl.store(report + step, of_all, mask=heads < HEADS)
    tl.store(report + 2 * step, squares, mask=heads < HEADS)
    tl.store(report + 3 * step, of_maps, mask=heads < HEADS)
    tl.store(report + 4 * step, products, mask=heads < HEADS)


@triton.jit
def combine_kernel(
    reduced, maps, means, factors, out, plane,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """out = factors[0] (R - means[0]) + factors[1] (A - means[1]) + factors[2], all (B, H, plane).

    Args:
        means, factors: (2, H) and (3, H).
    """
    map_number, head = tl.program_id(0), tl.program_id(0) % HEADS
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    offsets = map_number.to(tl.int64) * plane + at
    r = tl.load(reduced + offsets, mask=at < plane, other=0.0).to(TYPE) - tl.load(means + head)
    a = tl.load(maps + offsets, mask=at < plane, other=0.0).to(TYPE) - tl.load(means + HEADS + head)
    x = tl.load(factors + head) * r + tl.load(factors + HEADS + head) * a + tl.load(factors + 2 * HEADS + head)
    tl.store(out + offsets, x.to(out.dtype.element_ty), mask=at < plane)
