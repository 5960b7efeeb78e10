"""Random numbers as a pure function of what they are for.

A number used on a sample depends on (seed, epoch, sample index), on the operation that asks and on its place among the
operation's numbers. It does not depend on the worker, the rank, the order of reading, or what was drawn before. So a
resumed run needs no saved generator state, changing one operation of a recipe leaves the draws of the others as they
were, and the numbers of a whole batch can be computed at once, on any device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum

import numpy as np

from pipeline.errors import UserError
from pipeline.hashing import hash64

# They keep these keys apart from each other and from the other users of `hash64`.
_SAMPLE, _CHUNK = 201, 202


class Stream(IntEnum):
    """Who asks for numbers. The values are part of the reproducibility promise: append, never renumber."""

    CROP = 0
    FLIP = 1
    AFFINE = 2
    RAND_AUGMENT = 3
    COLOR_JITTER = 4
    RANDOM_ERASING = 5
    ERASING_NOISE = 6
    MIX = 7
    MIX_WEIGHT = 8
    MIX_PARTNER = 9
    MIX_BOX = 10
    MIX_TOKEN = 11


def sample_key(seed: int, epoch: int, index: int) -> int:
    """The 64-bit key of one presentation of a sample.

    Under repeated augmentation the copies of a sample must come with different `index`, or all look the same.
    """
    return int(hash64(_SAMPLE, seed, epoch, index))


def chunk_key(seed: int, step: int, lane: int) -> int:
    """The 64-bit key of the samples that a global step takes of one lane: what mixing draws from."""
    return int(hash64(_CHUNK, seed, step, lane))


def check_partners(chunk: int, what: str, instead: str) -> None:
    """Refuse a lane chunk of one sample, which has no partner.

    Args:
        chunk: samples that a step takes of each lane.
        what: what takes partners.
        instead: the setting that does without.

    Raises:
        UserError: the chunk has one sample.
    """
    if chunk < 2:
        raise UserError(
            f"{what} its partners from the same lane chunk, and a chunk of 1 sample has none: "
            f"set a smaller data.lanes or a larger train.global_batch_size, or {instead}"
        )


def uniforms(key: int, stream: Stream, n: int) -> np.ndarray:
    """(n,) float64 in [0, 1) with 53 random bits. The first numbers are the same whatever n is."""
    return (hash64(key, stream, np.arange(n)) >> np.uint64(11)) * 2.0**-53


class Numbers:
    """The uniform numbers of one presentation of a sample, stream by stream.

    Args:
        key: from `sample_key`.
        known: numbers computed before; others are computed when asked for.
    """

    def __init__(self, key: int, known: Mapping[Stream, list[float]] | None = None) -> None:
        self.key = key
        self._known = known or {}

    def of(self, stream: Stream, n: int) -> list[float]:
        """The first `n` numbers of a stream (at least)."""
        known = self._known.get(stream)
        return uniforms(self.key, stream, n).tolist() if known is None else known

    @staticmethod
    def of_batch(seed: int, epoch: int, indices: np.ndarray, needed: Mapping[Stream, int]) -> list[Numbers]:
        """Those of many presentations at once, equal to `Numbers(sample_key(seed, epoch, index))` for each.

        Args:
            indices: (b,) the samples' numbers.
            needed: how many numbers of which streams.
        """
        keys = hash64(_SAMPLE, seed, epoch, indices)
        streams = np.repeat([int(stream) for stream in needed], list(needed.values()))
        places = np.concatenate([np.arange(0), *(np.arange(n) for n in needed.values())])
        rows = ((hash64(keys[:, None], streams, places) >> np.uint64(11)) * 2.0**-53).tolist()
        ends = np.cumsum([0, *needed.values()]).tolist()
        return [
            Numbers(key, {stream: row[ends[i] : ends[i + 1]] for i, stream in enumerate(needed)})
            for key, row in zip(keys.tolist(), rows, strict=True)
        ]


def normals(key: int, stream: Stream, n: int) -> np.ndarray:
    """(n,) float32 from N(0, 1), by Box and Muller: each 64-bit hash gives two."""
    bits = hash64(key, stream, np.arange((n + 1) // 2))
    # 1 - u lies in (0, 1], where the logarithm is finite.
    u = 1 - (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    angle = (bits & np.uint64((1 << 24) - 1)).astype(np.float32) * np.float32(2 * math.pi * 2**-24)
    radius = np.sqrt(-2 * np.log(u))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:n]


def generator(key: int, stream: Stream) -> np.random.Generator:
    """A fresh NumPy generator, for distributions that have no simple formula in uniform numbers.

    Prefer `uniforms`: NumPy promises what a `Generator` makes of its bits for one version only.
    """
    return np.random.Generator(np.random.Philox(key=(int(stream) << 64) | key))
