"""Counter-based random numbers: a pure function from integers to bits.

Every random decision about data is `hash64(what it is about)`, so it needs no state, no order and no saved generator,
and is the same on any machine and with any NumPy. The mixing function is SplitMix64's finaliser (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
_ALL = 2**64 - 1


def _finalise(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _finalise_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _ALL
    return x ^ (x >> 31)


def hash64(*keys: int | np.ndarray) -> np.ndarray:
    """Mix integers, or broadcastable integer arrays, into uint64 of the broadcast shape. The order of keys matters."""
    first, whole = 0, 0
    for key in keys:
        if not isinstance(key, int):
            break
        # What comes before the first array is one number, for which NumPy takes ten times as long.
        first = _finalise_int(((first + GOLDEN) & _ALL) ^ _finalise_int((key + GOLDEN) & _ALL))
        whole += 1
    state: Any = np.uint64(first)
    golden = np.uint64(GOLDEN)
    with np.errstate(over="ignore"):
        for key in keys[whole:]:
            state = _finalise(np.asarray(state + golden) ^ _finalise(np.asarray(key).astype(np.uint64) + golden))
    return np.asarray(state)


def seed64(*keys: int) -> int:
    """A seed for another generator, as a non-negative Python int below 2**63."""
    return int(hash64(*keys) >> np.uint64(1))


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """float32 in [0, 1) with 24 random bits, of the keys' broadcast shape."""
    return (hash64(*keys) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def permutation(n: int, *keys: int) -> np.ndarray:
    """A permutation of range(n), int64.

    Sorting hashes costs more than a Fisher-Yates shuffle, but NumPy promises the stream of `Generator.permutation` for
    one version only, and a run must give the same order for years.
    """
    return np.argsort(hash64(*keys, np.arange(n)), kind="stable")
