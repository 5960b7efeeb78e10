"""What the Triton kernels behind `refine_fused` share; shapes and constants are those of `refine_kernel`."""

# Triton grows tuples by adding others and has no starred entries.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def of_group(values, size):
    """Where the group of a program has its part of what has `size` numbers for each."""
    return values + tl.program_id(2).to(tl.int64) * size


@triton.jit
def number(count, TYPE: tl.constexpr):
    """An integer in floating point; Triton takes an argument of 1 for a constant."""
    return tl.full((), 0.0, dtype=TYPE) + count


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
    """The expanded maps behind the first ReLU6, (CH, P), and the maps as read, (HP, P).

    In half precision the maps are not centred: products are exact and summed in float32, so `shift` can do it.

    Args:
        maps, mask: where to read them and whether to, (HP, P).
        top: 6 where a pixel lies in the maps and 0 outside, or one of them for all.
    """
    x = tl.load(maps, mask=mask, other=0.0)
    if x.dtype.primitive_bitwidth > 16:
        x = x - center
    return clamped(product(weights, x, TYPE) + shift, top), x


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
def tiles(plane, P: tl.constexpr, TILES: tl.constexpr):
    """Of a program that takes `TILES` times `P` pixels of a sample: the sample, and the first of them."""
    runs = (plane + P * TILES - 1) // (P * TILES)
    return tl.program_id(0) // runs, tl.program_id(0) % runs * (P * TILES)


@triton.jit
def line(index, rows, run):
    """Of runs of rows, counted through the samples: the sample, and its row that the run begins with."""
    runs = (rows + run - 1) // run
    return index // runs, index % runs * run


@triton.jit
def band(kernel, channels, DY: tl.constexpr, HIDDEN: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """What each column adds to the others below or above, by row DY of the local kernels: (CH, WIDTH, WIDTH)."""
    dx = tl.arange(0, WIDTH)[:, None] - tl.arange(0, WIDTH)[None, :] + K // 2
    inside = ((dx >= 0) & (dx < K))[None, :, :] & (channels < HIDDEN)[:, None, None]
    return tl.load(kernel + (channels * K * K)[:, None, None] + (DY * K + dx)[None, :, :], mask=inside, other=0.0)


@triton.jit
def beside(values, CH: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over columns that a thread holds where products on tensor cores leave them: (CH, LINES, 4)."""
    return tl.sum(tl.sum(values.reshape(CH, LINES, WIDTH // 8, 4, 2), 4), 2)


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
