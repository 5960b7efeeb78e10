"""Resizing without antialiasing, compiled; see `kernels` on signatures and indices."""

from __future__ import annotations

import math

import numba
import numpy as np

from pipeline.data.fast.instructions import blend_four

_PICTURE = "uint8[:, :, ::1]"
_U = np.uint64
_THREE = np.uint64(3)


@numba.njit(cache=True, nogil=True, inline="always")
def _between(a, b, weight):
    return np.uint8(np.int32(a + weight * (b - a)))


@numba.njit(
    f"void({_PICTURE}, int64, int64, int64, int64, boolean, {_PICTURE})", cache=True, nogil=True, boundscheck=False
)
def resize_point(source, top, left, height, width, mirror, out):
    """Resize a box of `source` to `out`, each pixel interpolated linearly between its four neighbours, cut to integers.

    No antialiasing, the box's edge repeated: Pillow's EXTENT transform of the cropped picture. In single precision, so
    that a pixel in some ten thousand is one less or more.

    Args:
        mirror: write the picture from right to left.
    """
    rows, columns, channels = out.shape
    step_y, step_x = height / rows, width / columns
    n = width * channels
    line = np.zeros(n + 1, np.float32)
    near, far, part = np.empty(columns, np.uint64), np.empty(columns, np.uint64), np.empty(columns, np.float32)
    for x in range(columns):
        place = (x + 0.5) * step_x - 0.5
        first = math.floor(place)
        at = columns - 1 - x if mirror else x
        part[at] = place - first
        near[at] = min(max(first, 0), width - 1) * channels
        far[at] = min(max(first + 1, 0), width - 1) * channels
    flat = out.reshape(out.size)
    for y in range(rows):
        place = (y + 0.5) * step_y - 0.5
        first = math.floor(place)
        weight = np.float32(place - first)
        above = source[top + min(max(first, 0), height - 1), left : left + width].reshape(n)
        below = source[top + min(max(first + 1, 0), height - 1), left : left + width].reshape(n)
        for i in range(n):
            a = np.float32(above[i])
            line[i] = a + weight * (np.float32(below[i]) - a)
        start = _U(y * columns * channels)
        # The fourth value of a pixel is the place of the next pixel. Behind the last one there is none.
        fours = columns - (y == rows - 1) if channels == 3 else 0
        for x in range(fours):
            blend_four(line, near[_U(x)], far[_U(x)], part[_U(x)], flat, start + _THREE * _U(x))  # type: ignore[call-arg]
        for x in range(fours, columns):
            for c in range(channels):
                i, j = near[_U(x)] + _U(c), far[_U(x)] + _U(c)
                flat[start + _U(x * channels + c)] = _between(line[i], line[j], part[_U(x)])
