"""Planes of luminance and chrominance to RGB, with the numbers of libjpeg.

Chrominance of half the size becomes larger by a triangle: of two neighbours the nearer one counts three times.
Colours: ITU-T T.871 (JFIF), in fixed point with 16 bits behind the point.
"""

from __future__ import annotations

import numba
import numpy as np

_i32 = np.int32
_u64 = np.uint64
_ONE, _TWO = _u64(1), _u64(2)

# Numba makes sums and products of 64 bits; only what is cut to 32 at once is made eight at a time.


@numba.njit("int32(int32)", cache=True, nogil=True)
def _clamped(value):
    return _i32(min(max(value, _i32(0)), _i32(255)))


@numba.njit("int32(int32, int32, int32)", cache=True, nogil=True)
def _packed(y, b, r):
    """Red, green and blue in the lowest bytes."""
    red = _clamped(_i32(y + _i32(_i32(_i32(91881 * r) + 32768) >> 16)))
    green = _clamped(_i32(y + _i32(_i32(_i32(_i32(-22554 * b) - _i32(46802 * r)) + 32768) >> 16)))
    blue = _clamped(_i32(y + _i32(_i32(_i32(116130 * b) + 32768) >> 16)))
    return red | _i32(green << 8) | _i32(blue << 16)


@numba.njit("void(uint8[::1], int64[:, ::1], int64[::1], uint8[:, :, ::1])", cache=True, nogil=True, boundscheck=False)
def to_rgb(samples, planes, where, out):
    """Make RGB of a rectangle.

    Args:
        samples: of the units around it.
        planes: (3, 2), of luminance and chrominance: where the samples of the units begin, and those of a next row.
        where: the rectangle's top and left in the picture; those of the units; width and height of the picture;
            pixels per sample of chrominance, across and down.
        out: (h, w, 3), takes the pixels.
    """
    top, left, unit_top, unit_left, width, height, across, down = where
    h, w = out.shape[0], out.shape[1]
    first, last = left // across, (left + w - 1) // across + 1  # samples of chrominance
    columns, rows = (width + across - 1) // across, (height + down - 1) // down
    before, behind = 1 if first else 0, 1 if last < columns else 0  # neighbours
    count = last - first
    sums = np.empty(count + 2, np.int32)
    lines = np.empty(2 * across * count, np.int32)  # of both planes
    pixels = np.empty(w, np.int32)
    target = out.reshape(h * w * 3)
    # With halves rounded down in one pixel of a sample and up in the other the numbers stay the same on average.
    low, high = (_i32(8), _i32(7)) if down == 2 else (_i32(4), _i32(8))
    end = _u64(0)
    for row in range(top, top + h):
        near = row // down
        far = min(max(near + (1 if row % 2 else -1), 0), rows - 1) if down == 2 else near
        for plane in range(2):
            start, stride = planes[plane + 1, 0] + first - unit_left // across, planes[plane + 1, 1]
            this = _u64(start + (near - unit_top // down) * stride)
            other = _u64(start + (far - unit_top // down) * stride)
            line = _u64(plane * across * count)
            if across == 1:
                for i in range(_u64(count)):
                    lines[line + i] = samples[this + i]
                continue
            shift = _u64(1 - before)
            for i in range(_u64(before + count + behind)):
                k = i - _u64(before)
                sums[shift + i] = _i32(_i32(samples[this + k]) * _i32(3)) + _i32(samples[other + k])
            if not before:
                sums[0] = sums[1]
            if not behind:
                sums[count + 1] = sums[count]
            for i in range(_u64(count)):
                here = _i32(sums[i + _ONE] * 3)
                lines[line + _TWO * i] = _i32(here + sums[i] + low) >> 4
                lines[line + _TWO * i + _ONE] = _i32(here + sums[i + _TWO] + high) >> 4
        blue = _u64(left - first * across)
        red = _u64(across * count) + blue
        this = _u64(planes[0, 0] + (row - unit_top) * planes[0, 1] + left - unit_left)
        for x in range(_u64(w)):
            pixels[x] = _packed(_i32(samples[this + x]), _i32(lines[blue + x] - 128), _i32(lines[red + x] - 128))
        for x in range(_u64(w - 1)):  # a store of four bytes, of which the next one writes over the last
            p = _u64(pixels[x])
            target[end], target[end + _ONE] = p & _u64(255), p >> _u64(8) & _u64(255)
            target[end + _TWO], target[end + _u64(3)] = p >> _u64(16) & _u64(255), p >> _u64(24) & _u64(255)
            end += _u64(3)
        p = _u64(pixels[w - 1])
        target[end], target[end + _ONE], target[end + _TWO] = p, p >> _u64(8), p >> _u64(16)
        end += _u64(3)
