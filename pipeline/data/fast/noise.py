"""Normal noise for erased boxes, its hashes by a compiled loop."""

from __future__ import annotations

import math

import numpy as np

from pipeline.data.augment.keyed import Stream
from pipeline.data.augment.lazy import LazyModule
from pipeline.hashing import hash64

hashes = LazyModule("pipeline.data.fast.hashes")


def normals(key: int, stream: Stream, n: int) -> np.ndarray:
    """`keyed.normals` to the bit, in less than half of the time: (n,) float32 from N(0, 1)."""
    u, angle = np.empty(((n + 1) // 2), np.float32), np.empty((n + 1) // 2, np.float32)
    hashes.pairs(hash64(key, stream)[()], u, angle)
    u *= np.float32(2**-24)
    angle *= np.float32(2 * math.pi * 2**-24)
    radius = np.sqrt(-2 * np.log(1 - u))
    values = np.empty((len(u), 2), np.float32)
    np.multiply(radius, np.cos(angle), out=values[:, 0])
    np.multiply(radius, np.sin(angle), out=values[:, 1])
    return values.reshape(-1)[:n]
