"""Compiled loops over the pixels of one 8-bit picture, (H, W, C) with C = 1 or 3.

They give the numbers that Pillow gives, except where a docstring says by how much they may differ. Signatures are
fixed, so that everything is compiled (or read from Numba's cache) when the module is imported: once, in the server that
loader processes are forked from. Without `fastmath` the compiler may not reorder or fuse floating-point operations,
so the results are the same on every processor.

Pixels are walked as a flat array with unsigned indices: Numba would look at signed ones for negative values, which mean
places from the end, and that keeps the compiler from using vector instructions.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

_PICTURE = "uint8[:, :, ::1]"
_PART = "uint8[:, :, :]"
_U = np.uint64
_ONE, _TWO = np.uint64(1), np.uint64(2)


def _compiled(signature: str) -> Any:
    return numba.njit(signature, cache=True, nogil=True, boundscheck=False)


@_compiled(f"void({_PART}, boolean, {_PICTURE})")
def copy(source, mirror, out):
    """Copy a picture, from right to left if `mirror`."""
    rows, columns, channels = out.shape
    for y in range(rows):
        for x in range(columns):
            at = columns - 1 - x if mirror else x
            for c in range(channels):
                out[y, at, c] = source[y, x, c]


@_compiled(f"void({_PICTURE}, float64[::1], uint8[::1], {_PICTURE})")
def warp_nearest(source, matrix, fill, out):
    """The pixel at (x, y) of `out` is the one of `source` at (a x + b y + c, d x + e y + f), `fill` outside of it.

    Coordinates are followed in 16.16 fixed point, as Pillow does.
    """
    rows, columns, channels = source.shape
    a, b, c, d, e, f = matrix
    fixed_a, fixed_b = math.floor(a * 65536 + 0.5), math.floor(b * 65536 + 0.5)
    fixed_d, fixed_e = math.floor(d * 65536 + 0.5), math.floor(e * 65536 + 0.5)
    line_x = math.floor((c + a * 0.5 + b * 0.5) * 65536 + 0.5)
    line_y = math.floor((f + d * 0.5 + e * 0.5) * 65536 + 0.5)
    pixels, target = source.reshape(source.size), out.reshape(out.size)
    k = _U(0)
    for _ in range(out.shape[0]):
        at_x, at_y = line_x, line_y
        for _ in range(out.shape[1]):
            from_x, from_y = at_x >> 16, at_y >> 16
            if 0 <= from_x < columns and 0 <= from_y < rows:
                i = _U((from_y * columns + from_x) * channels)
                target[k] = pixels[i]
                if channels == 3:
                    target[k + _ONE] = pixels[i + _ONE]
                    target[k + _TWO] = pixels[i + _TWO]
            else:
                target[k] = fill[0]
                if channels == 3:
                    target[k + _ONE] = fill[1]
                    target[k + _TWO] = fill[2]
            k += _U(channels)
            at_x += fixed_a
            at_y += fixed_d
        line_x += fixed_b
        line_y += fixed_e


@_compiled(f"void({_PICTURE}, float64[::1], uint8[::1], {_PICTURE})")
def warp_bilinear(source, matrix, fill, out):
    """As `warp_nearest`, interpolated linearly between four pixels, cut to integers."""
    rows, columns, channels = source.shape
    a, b, c, d, e, f = matrix
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            at_x = a * (x + 0.5) + b * (y + 0.5) + c
            at_y = d * (x + 0.5) + e * (y + 0.5) + f
            if not (0 <= at_x < columns and 0 <= at_y < rows):
                for k in range(channels):
                    out[y, x, k] = fill[k]
                continue
            at_x -= 0.5
            at_y -= 0.5
            left, top = math.floor(at_x), math.floor(at_y)
            part_x, part_y = at_x - left, at_y - top
            x0, x1 = max(left, 0), min(left + 1, columns - 1)
            y0, y1 = max(top, 0), min(top + 1, rows - 1)
            for k in range(channels):
                upper = source[y0, x0, k] + (float(source[y0, x1, k]) - float(source[y0, x0, k])) * part_x
                lower = source[y1, x0, k] + (float(source[y1, x1, k]) - float(source[y1, x0, k])) * part_x
                out[y, x, k] = np.uint8(upper + (lower - upper) * part_y)


@numba.njit(cache=True, nogil=True, inline="always")
def _cubic(v1, v2, v3, v4, d):
    return v2 + d * ((v3 - v1) + d * ((2 * (v1 - v2) + v3 - v4) + d * (v2 - v1 + v4 - v3)))


@numba.njit(cache=True, nogil=True, inline="always")
def _cubic_in_row(line, left, k, d):
    return _cubic(float(line[left - 1, k]), float(line[left, k]), float(line[left + 1, k]), float(line[left + 2, k]), d)


@_compiled(f"void({_PICTURE}, float64[::1], uint8[::1], {_PICTURE})")
def warp_bicubic(source, matrix, fill, out):
    """As `warp_nearest`, interpolated by cubics (a = -1) through 16 pixels, cut to integers."""
    rows, columns, channels = source.shape
    a, b, c, d, e, f = matrix
    at, values = np.empty(4, np.int64), np.empty(4, np.float64)
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            at_x = a * (x + 0.5) + b * (y + 0.5) + c
            at_y = d * (x + 0.5) + e * (y + 0.5) + f
            if not (0 <= at_x < columns and 0 <= at_y < rows):
                for k in range(channels):
                    out[y, x, k] = fill[k]
                continue
            at_x -= 0.5
            at_y -= 0.5
            left, top = math.floor(at_x), math.floor(at_y)
            part_x, part_y = at_x - left, at_y - top
            if 1 <= left < columns - 2 and 1 <= top < rows - 2:
                for k in range(channels):
                    value = _cubic(
                        _cubic_in_row(source[top - 1], left, k, part_x),
                        _cubic_in_row(source[top], left, k, part_x),
                        _cubic_in_row(source[top + 1], left, k, part_x),
                        _cubic_in_row(source[top + 2], left, k, part_x),
                        part_y,
                    )
                    out[y, x, k] = np.uint8(min(max(value, 0.0), 255.0))
                continue
            for i in range(4):
                at[i] = min(max(left - 1 + i, 0), columns - 1)
            for k in range(channels):
                for j in range(4):
                    # Rows beyond the edge repeat what was found for the row before.
                    row = top - 1 + j
                    if j == 0 or 0 <= row < rows:
                        line = source[min(max(row, 0), rows - 1)]
                        values[j] = _cubic(
                            float(line[at[0], k]),
                            float(line[at[1], k]),
                            float(line[at[2], k]),
                            float(line[at[3], k]),
                            part_x,
                        )
                    else:
                        values[j] = values[j - 1]
                value = _cubic(values[0], values[1], values[2], values[3], part_y)
                out[y, x, k] = np.uint8(min(max(value, 0.0), 255.0))


@_compiled(f"void({_PICTURE}, uint8[:, ::1])")
def apply_tables(picture, tables):
    """Replace every value v of channel c by `tables[c, v]`, in place; one table is that of all channels."""
    rows, columns, channels = picture.shape
    flat = picture.reshape(picture.size)
    first, second, third = tables[0], tables[min(1, len(tables) - 1)], tables[len(tables) - 1]
    for i in range(rows * columns):
        k = _U(channels * i)
        flat[k] = first[flat[k]]
        if channels == 3:
            flat[k + _ONE] = second[flat[k + _ONE]]
            flat[k + _TWO] = third[flat[k + _TWO]]


@_compiled(f"int64[:, ::1]({_PICTURE})")
def histograms(picture):
    """(C, 256) how often each value occurs in each channel."""
    rows, columns, channels = picture.shape
    flat = picture.reshape(picture.size)
    counts = np.zeros((channels, 256), np.int64)
    first, second, third = counts[0], counts[min(1, channels - 1)], counts[channels - 1]
    for i in range(rows * columns):
        k = _U(channels * i)
        first[flat[k]] += 1
        if channels == 3:
            second[flat[k + _ONE]] += 1
            third[flat[k + _TWO]] += 1
    return counts


@numba.njit(cache=True, nogil=True, inline="always")
def _grey(red, green, blue):
    """ITU-R 601-2 luma in 16-bit fixed point, rounded."""
    return (np.int32(red) * 19595 + np.int32(green) * 38470 + np.int32(blue) * 7471 + 0x8000) >> 16


@_compiled(f"int64({_PICTURE})")
def grey_sum(picture):
    """Sum of the grey values of all pixels."""
    rows, columns, channels = picture.shape
    flat = picture.reshape(picture.size)
    total = 0
    for i in range(rows * columns):
        k = _U(channels * i)
        total += _grey(flat[k], flat[k + _ONE], flat[k + _TWO]) if channels == 3 else np.int32(flat[k])
    return total


@numba.njit(cache=True, nogil=True, inline="always")
def _blend(low, high, factor):
    value = np.float32(low) + factor * np.float32(np.int32(high) - np.int32(low))
    return np.uint8(np.int32(min(max(value, np.float32(0)), np.float32(255))))


@_compiled(f"void({_PICTURE}, float32)")
def saturate(picture, factor):
    """Distance of each value from its pixel's grey, times `factor`, in place."""
    rows, columns, channels = picture.shape
    if channels == 1:
        return
    flat = picture.reshape(picture.size)
    for i in range(rows * columns):
        k = _U(3 * i)
        red, green, blue = flat[k], flat[k + _ONE], flat[k + _TWO]
        grey = _grey(red, green, blue)
        flat[k] = _blend(grey, red, factor)
        flat[k + _ONE] = _blend(grey, green, factor)
        flat[k + _TWO] = _blend(grey, blue, factor)


@_compiled(f"void({_PICTURE}, float32, {_PICTURE})")
def sharpen(source, factor, out):
    """Distance of each value from the smoothed picture, times `factor`; pixels at the edge stay.

    Smoothed is the mean of the 3 x 3 pixels around with weight 5 (else 1) for the middle one, rounded.
    """
    rows, columns, channels = source.shape
    width = columns * channels
    inner = max(width - 2 * channels, 0)
    smooth = np.empty(inner, np.int32)
    for y in range(rows):
        if y == 0 or y == rows - 1 or columns < 3:
            out[y] = source[y]
            continue
        above, line, below = source[y - 1].reshape(width), source[y].reshape(width), source[y + 1].reshape(width)
        target = out[y].reshape(width)
        target[:channels] = line[:channels]
        target[inner + channels :] = line[inner + channels :]
        # Nine views with one running index, which the compiler turns into vector loads.
        upper_left, upper, upper_right = above[:inner], above[channels:], above[2 * channels :]
        left, middle, right = line[:inner], line[channels:], line[2 * channels :]
        lower_left, lower, lower_right = below[:inner], below[channels:], below[2 * channels :]
        for i in range(inner):
            total = np.int32(upper_left[i]) + np.int32(upper[i]) + np.int32(upper_right[i])
            total += np.int32(left[i]) + np.int32(5) * np.int32(middle[i]) + np.int32(right[i])
            total += np.int32(lower_left[i]) + np.int32(lower[i]) + np.int32(lower_right[i])
            # Rounded: a 26th of 2 total + 13, cut. The product and shift are exact up to 6,650.
            smooth[i] = ((np.int32(2) * total + np.int32(13)) * np.int32(10083)) >> np.int32(18)
        sharp = target[channels:]
        for i in range(inner):
            sharp[i] = _blend(smooth[i], middle[i], factor)


@_compiled("void(uint8[:, :, :, ::1], float32[::1], float32[::1], float32[:, :, :, ::1])")
def normalize(pixels, mean, std, out):
    """`out[b, c, y, x] = (pixels[b, y, x, c] / 255 - mean[c]) / std[c]`, in this order, as torch does it."""
    batch, rows, columns, channels = pixels.shape
    n, most = _U(rows * columns), np.float32(255)
    # In variables of their own: of the arrays the compiler can't know that `out` is none of them, and reads them anew.
    mean_1, mean_2, mean_3 = mean[0], mean[min(1, channels - 1)], mean[channels - 1]
    std_1, std_2, std_3 = std[0], std[min(1, channels - 1)], std[channels - 1]
    for b in range(batch):
        flat = pixels[b].reshape(rows * columns * channels)
        red = out[b, 0].reshape(rows * columns)
        if channels == 1:
            for i in range(n):
                red[i] = (np.float32(flat[i]) / most - mean_1) / std_1
            continue
        green, blue = out[b, 1].reshape(rows * columns), out[b, 2].reshape(rows * columns)
        # A loop for each channel would read every line of the cache three times.
        for i in range(n):
            k = _U(3) * i
            red[i] = (np.float32(flat[k]) / most - mean_1) / std_1
            green[i] = (np.float32(flat[k + _ONE]) / most - mean_2) / std_2
            blue[i] = (np.float32(flat[k + _TWO]) / most - mean_3) / std_3
