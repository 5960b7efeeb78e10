"""`pipeline.hashing` in a compiled loop; see `kernels` on signatures and indices."""

from __future__ import annotations

import numba
import numpy as np

from pipeline.hashing import GOLDEN

_U = np.uint64
_GOLDEN = np.uint64(GOLDEN)


@numba.njit(cache=True, nogil=True, inline="always")
def _finalise(x):
    x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
    return x ^ (x >> _U(31))


@numba.njit("void(uint64, float32[::1], float32[::1])", cache=True, nogil=True, boundscheck=False)
def pairs(state, first, second):
    """From `hash64(..., i)` for each i the upper and the lower 24 bits, as floats.

    Args:
        state: `hash64(...)` of the keys before i.
    """
    state += _GOLDEN
    for i in range(_U(len(first))):
        bits = _finalise(state ^ _finalise(i + _GOLDEN))
        first[i] = np.float32(np.int64(bits >> _U(40)))
        second[i] = np.float32(np.int64(bits & _U((1 << 24) - 1)))
