"""Which samples form global step s: a pure function of the manifest, the seed and the batch, never of the workers.

An epoch's samples are laid on a *line*: the shards in a new order, one after the other, the whole turned by a random
offset, its tail cut so that whole batches remain. The line is cut into V equal *lanes*. Every step takes the next
`chunk = batch / V` samples of every lane; with W processes, process r reads the lanes r, r + W, r + 2W, ... Inside a
lane samples are permuted in windows, so that reading stays local and a remote shard can be streamed.

So a step has the same samples whatever W is, and any step can be computed without those before it: the position in the
data is the number of steps done, and nothing else needs to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.hashing import permutation, seed64

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
        repeats: copies of a sample in a step (repeated augmentation, Hoffer et al. 2020); an epoch then sees
            1/repeats of the samples, as in DeiT's RASampler.

    Raises:
        UserError: the epoch is smaller than a batch, or the batch can't be cut into the lanes or copies.
    """

    shard_samples: Sequence[int]
    seed: int
    batch: int
    lanes: int
    shuffle: str = "window"
    window: int = 8192
    repeats: int = 1
    _lane_cache: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    _line_cache: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch % self.lanes:
            raise UserError(f"data.lanes={self.lanes} does not divide train.global_batch_size={self.batch}")
        if self.chunk % self.repeats:
            raise UserError(
                f"data.repeats={self.repeats} does not divide the {self.chunk} samples that a step takes of each of "
                f"{self.lanes} lanes; set data.lanes so that global_batch_size / lanes is a multiple of {self.repeats}"
            )
        if self.steps_per_epoch == 0:
            raise UserError(
                f"train.global_batch_size={self.batch} is more than the {self.num_samples} samples of data.train; "
                "set a smaller batch"
            )

    @property
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

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> StepSamples:
        """Samples of process `rank` in global step `step` (counted from 0).

        Raises:
            UserError: `world_size` does not divide the lanes.
        """
        if self.lanes % world_size:
            raise UserError(_bad_world(self.lanes, self.batch, world_size))
        epoch, position = divmod(step, self.steps_per_epoch)
        lanes = np.arange(rank, self.lanes, world_size)
        distinct = self.chunk // self.repeats
        take = slice(position * distinct, (position + 1) * distinct)
        samples = np.concatenate([self._lane(epoch, int(lane))[take] for lane in lanes])
        copies = np.tile(np.arange(self.repeats), len(samples))
        return StepSamples(epoch, np.repeat(samples, self.repeats), copies, lanes)

    def _lane(self, epoch: int, lane: int) -> np.ndarray:
        cached = self._lane_cache.get((epoch, lane))
        if cached is None:
            # Loader processes walk forward, so only the lanes of the epoch at hand are worth their memory.
            for key in [k for k in self._lane_cache if k[0] != epoch]:
                del self._lane_cache[key]
            cached = self._lane_cache[epoch, lane] = self._make_lane(epoch, lane)
        return cached

    def _make_lane(self, epoch: int, lane: int) -> np.ndarray:
        length = self.steps_per_epoch * (self.chunk // self.repeats)
        positions = np.arange(lane * length, (lane + 1) * length)
        if self.shuffle == "window":
            starts = range(0, length, self.window)
            windows = [positions[start : start + self.window] for start in starts]
            positions = np.concatenate(
                [w[permutation(len(w), self.seed, _WINDOW, epoch, lane, i)] for i, w in enumerate(windows)]
            )
        return self._samples_at(epoch, positions)

    def _samples_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Samples at positions of the epoch's line."""
        if self.shuffle == "none":
            return positions
        if epoch not in self._line_cache:
            self._line_cache.clear()
            make = self._permuted_samples if self.shuffle == "full" else self._permuted_shards
            self._line_cache[epoch] = make(epoch)
        if self.shuffle == "full":
            return self._line_cache[epoch][positions]
        first_sample, line_start, offset = self._line_cache[epoch]
        # Turning the line moves the cut tail, so that which samples an epoch leaves out is random too.
        turned = (positions + offset) % self.num_samples
        shard = np.searchsorted(line_start, turned, side="right") - 1
        return first_sample[shard] + turned - line_start[shard]

    def _permuted_samples(self, epoch: int) -> np.ndarray:
        return permutation(self.num_samples, self.seed, _FULL, epoch)

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        sizes = np.asarray(self.shard_samples, dtype=np.int64)
        order = permutation(len(sizes), self.seed, _SHARDS, epoch)
        first_sample = (np.cumsum(sizes) - sizes)[order]
        line_start = np.cumsum(sizes[order]) - sizes[order]
        return first_sample, line_start, seed64(self.seed, _OFFSET, epoch) % self.num_samples


def _bad_world(lanes: int, batch: int, world_size: int) -> str:
    fitting = [v for v in range(world_size, batch + 1, world_size) if batch % v == 0]
    if fitting:
        return (
            f"{world_size} processes can't share data.lanes={lanes} evenly; use a number of processes that divides "
            f"{lanes}, or start a new run with data.lanes={fitting[0]} (lanes are part of the data order)"
        )
    return f"{world_size} processes can't share train.global_batch_size={batch} evenly; set a multiple of {world_size}"
