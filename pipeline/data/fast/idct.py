"""The inverse cosine transform of 8 x 8 blocks, with the integers of libjpeg's accurate method.

Loeffler, Ligtenberg and Moschytz, "Practical fast 1-D DCT algorithms with 11 multiplications" (ICASSP 1989), in fixed
point with 13 bits behind the point, and 2 between the passes. All decoders that use the method agree to the last bit.
"""

from __future__ import annotations

import numba
import numpy as np

_i32 = np.int32
_u64 = np.uint64
# What is added before bits are cut off, so that it is rounded.
_HALF_1, _HALF_2 = 1 << 10, 1 << 17
_HIGH = 1 << 14


# Numba makes sums and products of 64 bits. Only those that are cut to 32 at once are made eight at a time.


@numba.njit("int32(int32, int32)", cache=True, nogil=True)
def _add(a, b):
    return _i32(a + b)


@numba.njit("int32(int32, int32)", cache=True, nogil=True)
def _sub(a, b):
    return _i32(a - b)


@numba.njit("int32(int32, int32)", cache=True, nogil=True)
def _mul(a, b):
    return _i32(a * b)


@numba.njit(f"UniTuple(int32, 8)({', '.join(9 * ['int32'])})", cache=True, nogil=True)
def _transform(a0, a1, a2, a3, a4, a5, a6, a7, half):
    """Eight values from eight coefficients, scaled by 2**13, and `half` added."""
    both = _mul(_add(a2, a6), 4433)
    even2, even3 = _sub(both, _mul(a6, 15137)), _add(both, _mul(a2, 6270))
    even0, even1 = _add(_mul(_add(a0, a4), 8192), half), _add(_mul(_sub(a0, a4), 8192), half)
    e0, e3, e1, e2 = _add(even0, even3), _sub(even0, even3), _add(even1, even2), _sub(even1, even2)
    s73, s51 = _add(a7, a3), _add(a5, a1)
    z5 = _mul(_add(s73, s51), 9633)
    z1, z2 = _mul(_add(a7, a1), -7373), _mul(_add(a5, a3), -20995)
    z3, z4 = _add(_mul(s73, -16069), z5), _add(_mul(s51, -3196), z5)
    o0, o1 = _add(_mul(a7, 2446), _add(z1, z3)), _add(_mul(a5, 16819), _add(z2, z4))
    o2, o3 = _add(_mul(a3, 25172), _add(z2, z3)), _add(_mul(a1, 12299), _add(z1, z4))
    return (
        _add(e0, o3),
        _add(e1, o2),
        _add(e2, o1),
        _add(e3, o0),
        _sub(e3, o0),
        _sub(e2, o1),
        _sub(e1, o2),
        _sub(e0, o3),
    )


@numba.njit("uint64(int32)", cache=True, nogil=True)
def _pixel(value):
    return _u64(min(max(_add(_i32(value >> 18), 128), _i32(0)), _i32(255)))


@numba.njit("int32(int32[::1], int32[::1], uint64[::1], int64, int64)", cache=True, nogil=True, boundscheck=False)
def transform(work, turned, plane, at, stride):
    """Turn a block of coefficients into pixels.

    Args:
        work: (64,), the coefficients, row by row; 0 afterwards.
        turned: (64,), written over.
        plane: takes the pixels, eight in a number, from `at` on, a row every `stride`.

    Returns:
        0; not 0: between the passes a number is larger than in any picture, which decoders treat in different ways.
    """
    over = _i32(0)
    for i in range(_u64(8)):
        i1, i2, i3 = i + _u64(8), i + _u64(16), i + _u64(24)
        i4, i5, i6, i7 = i + _u64(32), i + _u64(40), i + _u64(48), i + _u64(56)
        b0, b1, b2, b3, b4, b5, b6, b7 = _transform(
            work[i], work[i1], work[i2], work[i3], work[i4], work[i5], work[i6], work[i7], _HALF_1
        )
        b0, b1, b2, b3 = _i32(b0 >> 11), _i32(b1 >> 11), _i32(b2 >> 11), _i32(b3 >> 11)
        b4, b5, b6, b7 = _i32(b4 >> 11), _i32(b5 >> 11), _i32(b6 >> 11), _i32(b7 >> 11)
        work[i], work[i1], work[i2], work[i3] = b0, b1, b2, b3
        work[i4], work[i5], work[i6], work[i7] = b4, b5, b6, b7
        over |= _add(b0, _HIGH) | _add(b1, _HIGH) | _add(b2, _HIGH) | _add(b3, _HIGH)
        over |= _add(b4, _HIGH) | _add(b5, _HIGH) | _add(b6, _HIGH) | _add(b7, _HIGH)
    for r in range(_u64(8)):  # so that the second pass, too, is of eight neighbours
        for c in range(_u64(8)):
            turned[c * _u64(8) + r] = work[r * _u64(8) + c]
    for i in range(_u64(64)):
        work[i] = 0
    for i in range(_u64(8)):
        i1, i2, i3 = i + _u64(8), i + _u64(16), i + _u64(24)
        i4, i5, i6, i7 = i + _u64(32), i + _u64(40), i + _u64(48), i + _u64(56)
        b0, b1, b2, b3, b4, b5, b6, b7 = _transform(
            turned[i], turned[i1], turned[i2], turned[i3], turned[i4], turned[i5], turned[i6], turned[i7], _HALF_2
        )
        left = _pixel(b0) | _pixel(b1) << _u64(8) | _pixel(b2) << _u64(16) | _pixel(b3) << _u64(24)
        right = _pixel(b4) | _pixel(b5) << _u64(8) | _pixel(b6) << _u64(16) | _pixel(b7) << _u64(24)
        turned[i], turned[i1] = left, right
    for r in range(_u64(8)):
        left, right = _u64(turned[r]) & _u64(0xFFFFFFFF), _u64(turned[r + _u64(8)])
        plane[_u64(at) + r * _u64(stride)] = left | right << _u64(32)
    return _i32(over >> 15)


@numba.njit("void(int64, uint64[::1], int64, int64)", cache=True, nogil=True, boundscheck=False)
def fill(first, plane, at, stride):
    """As `transform`, of a block whose other coefficients are 0."""
    value = _u64(min(max(((first * 4 + 16) >> 5) + 128, 0), 255)) * _u64(0x0101010101010101)
    for r in range(_u64(8)):
        plane[_u64(at) + r * _u64(stride)] = value
