"""Which samples form global step s: a pure function of the manifest, the seed and the batch, never of the workers.

An epoch's samples are laid on a *line*: the shards in a new order, one after the other, the whole turned by a random
offset, its tail cut so that whole batches remain. The line is cut into V equal *lanes*. Every step takes the next
`chunk = batch / V` samples of every lane; with W processes, process r reads the lanes r, r + W, r + 2W, ... Inside a
lane samples are permuted in windows, so that reading stays local and a remote shard can be streamed.

So a step has the same samples whatever W is, and any step can be computed without those before it: the position in the
data is the number of steps done, and nothing else needs to be saved. docs/data_order.md draws it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.errors import UserError
from pipeline.hashing import hash64, permutation, seed64

# Streams of the counter-based generator (see pipeline.hashing): one per kind of decision.
_SHARDS, _OFFSET, _WINDOW, _FULL = range(4)


def default_lanes(global_batch_size: int) -> int:
    """Most lanes (64 at most) that leave a chunk of 8 samples, fewer for batches under 64, to mix within."""
    smallest_chunk = min(8, math.isqrt(global_batch_size - 1) + 1)
    fitting = [
        v for v in range(1, 65) if global_batch_size % v == 0 and global_batch_size // v >= smallest_chunk
    ]  # v = 1 always fits
    return max(fitting)


@dataclass(frozen=True)
class StepSamples:
    """The samples that one process trains on in one step, lane chunk after lane chunk.

    Attributes:
        epoch: epoch of the step.
        samples: (b,) int64, positions in the manifest (all shards end to end).
        copies: (b,) int64, which copy of a repeated sample this is, 0 without repeated augmentation.
        lanes: (b / chunk,) int64, the lane of each chunk.
    """

    epoch: int
    samples: np.ndarray
    copies: np.ndarray
    lanes: np.ndarray


@dataclass(frozen=True)
class DataOrder:
    """The order of a training run.

    Attributes:
        shard_samples: samples in each shard of the manifest.
        seed: seed of the run.
        batch: global batch size, in samples.
        lanes: V, a divisor of `batch`.
        shuffle: `window` (shards, then windows within a lane), `full` (one permutation of everything), `none`.
        window: samples per window.
        repeats: copies of a sample, which follow each other in its lane (repeated augmentation, Hoffer et al. 2020); an
            epoch then has 1/repeats of the samples, as in DeiT's RASampler.

    Raises:
        UserError: the epoch is smaller than a batch, or the batch can't be cut into the lanes.
    """

    shard_samples: Sequence[int]
    seed: int
    batch: int
    lanes: int
    shuffle: str = "window"
    window: int = 8192
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.lanes:
            raise UserError(
                f"data.lanes={self.lanes} does not divide train.global_batch_size={self.batch}; "
                f"set data.lanes to a divisor of {self.batch} (or leave it out)"
            )
        if self.steps_per_epoch == 0:
            raise UserError(
                f"train.global_batch_size={self.batch} is more than the {self.num_samples} samples of data.train; "
                "set a smaller batch"
            )

    @cached_property
    def num_samples(self) -> int:
        return sum(self.shard_samples)

    @property
    def chunk(self) -> int:
        """Samples that a step takes of each lane."""
        return self.batch // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the remainder, below one batch, is another one every epoch."""
        return self.num_samples // self.batch

    def check_world_size(self, world_size: int) -> None:
        """Make sure that the processes can share the lanes evenly.

        Raises:
            UserError: `world_size` does not divide the lanes.
        """
        if self.lanes % world_size == 0:
            return
        fitting = [str(w) for w in range(1, self.lanes + 1) if self.lanes % w == 0]
        fewer = " or ".join(filter(None, (", ".join(fitting[:-1]), fitting[-1])))
        lanes = next((v for v in range(world_size, self.batch + 1, world_size) if self.batch % v == 0), None)
        change = (
            f"train.global_batch_size a multiple of {world_size}, which {self.batch} is not"
            if lanes is None
            else f"data.lanes={lanes} (lanes are part of the data order)"
        )
        raise UserError(
            f"{world_size} processes can't share data.lanes={self.lanes} evenly; "
            f"use {fewer}, or start a new run with {change}"
        )

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> StepSamples:
        """Samples of process `rank` in global step `step` (counted from 0).

        Raises:
            UserError: `world_size` does not divide the lanes.
        """
        self.check_world_size(world_size)
        epoch, position = divmod(step, self.steps_per_epoch)
        places = position * self.chunk + self._chunk_places
        samples = self._lanes_of(epoch, rank, world_size)[:, places // self.repeats]
        lanes = np.arange(rank, self.lanes, world_size)
        return StepSamples(epoch, samples.reshape(-1), np.tile(places % self.repeats, len(lanes)), lanes)

    def epoch_lanes(self, epoch: int) -> np.ndarray:
        """(lanes, samples of a lane) distinct samples of an epoch, in the order in which each lane is read."""
        return self._make_lanes(epoch, np.arange(self.lanes))

    def __getstate__(self) -> dict[str, object]:
        # A loader process soon has its own; its copy of these megabytes would be for nothing.
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    @cached_property
    def _cache(self) -> dict[tuple[int, int, int], np.ndarray]:
        return {}

    @cached_property
    def _chunk_places(self) -> np.ndarray:
        """(chunk,) places of a chunk's samples among those that its lane has next.

        With repeats the second half runs backwards: mixing pairs the first with the last, the second with the last but
        one, and so no sample with its own copy (up to chunk / 2 copies).
        """
        places = np.arange(self.chunk)
        if self.repeats > 1:
            places[self.chunk // 2 :] = places[self.chunk // 2 :][::-1].copy()
        return places

    def _lanes_of(self, epoch: int, rank: int, world_size: int) -> np.ndarray:
        """(lanes of the process, distinct samples of a lane) samples of an epoch."""
        key = (epoch, rank, world_size)
        if key not in self._cache:
            # Steps are asked for in order, so that only the epoch at hand is worth its memory.
            self._cache.clear()
            self._cache[key] = self._make_lanes(epoch, np.arange(rank, self.lanes, world_size))
        return self._cache[key]

    def _make_lanes(self, epoch: int, lanes: np.ndarray) -> np.ndarray:
        length = -(-self.steps_per_epoch * self.chunk // self.repeats)  # rounded up
        positions = lanes[:, None] * length + np.arange(length)
        if self.shuffle == "none":
            return positions
        if self.shuffle == "full":
            return permutation(self.num_samples, self.seed, _FULL, epoch)[positions]
        for i, start in enumerate(range(0, length, self.window)):
            window = positions[:, start : start + self.window]
            keys = hash64(self.seed, _WINDOW, epoch, lanes[:, None], i, np.arange(window.shape[1]))
            window[:] = np.take_along_axis(window, np.argsort(keys, axis=1, kind="stable"), axis=1)
        return self._on_permuted_shards(epoch, positions)

    def _on_permuted_shards(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Samples at positions of the epoch's line."""
        sizes = np.asarray(self.shard_samples, dtype=np.int64)
        order = permutation(len(sizes), self.seed, _SHARDS, epoch)
        first_sample = (np.cumsum(sizes) - sizes)[order]
        line_start = np.cumsum(sizes[order]) - sizes[order]
        # Turning the line moves the cut tail, so that which samples an epoch leaves out is random too.
        turned = (positions + seed64(self.seed, _OFFSET, epoch) % self.num_samples) % self.num_samples
        shard = np.searchsorted(line_start, turned, side="right") - 1
        return first_sample[shard] + turned - line_start[shard]
