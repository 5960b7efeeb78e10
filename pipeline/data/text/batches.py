"""What a step and an evaluation get of a tokenised split: padded batches, in the project's own order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.order import DataOrder
from pipeline.data.pinned import brought
from pipeline.data.substitute import Replaced
from pipeline.data.text.tokens import TokenSplit

# Lengths are rounded up to a multiple, so that there are few shapes.
_MULTIPLE = 16


class TextBatch(NamedTuple):
    """One process's part of a global step, or of an evaluation.

    Attributes:
        ids, types: (b, N) int64, 0 in the padding.
        tokens: (b, N) bool, False in the padding.
        labels: (b,) int64 or float32.
        samples: (b,) int64, positions in the split; on the host.
        real: (b,) bool, False for samples that only fill up a batch of an evaluation.
        replaced: no sample ever is.
    """

    ids: Tensor
    types: Tensor
    tokens: Tensor
    labels: Tensor
    samples: Tensor
    real: Tensor
    replaced: list[Replaced] | None = None

    def to(self, device: torch.device) -> TextBatch:
        """On a device, but for the numbers of the samples."""
        if device.type == "cpu":
            return self
        ids, types, tokens, labels = (brought(t, device) for t in (self.ids, self.types, self.tokens, self.labels))
        return self._replace(ids=ids, types=types, tokens=tokens, labels=labels)

    def rows(self, part: slice) -> TextBatch:
        """A micro-batch."""
        return TextBatch._make([*(tensor[part] for tensor in self[:6]), None])


def step_batches(split: TokenSplit, order: DataOrder, steps: range, rank: int, world_size: int) -> Iterator[TextBatch]:
    """This process's batches of some steps.

    They are padded to the longest sample of the *global* batch: a sample meets the same padding on any number of
    processes.

    Raises:
        UserError: `world_size` does not divide the lanes.
    """
    order.check_world_size(world_size)
    for step in steps:
        whole = order.step(step).samples
        own = whole.reshape(order.lanes, order.chunk)[rank::world_size].reshape(-1)
        yield padded(split, own, len(own), int(split.lengths[whole].max()))


class EvalBatches:
    """All samples once, in equally many batches of the same size on every process; can be iterated again and again."""

    def __init__(self, split: TokenSplit, batch_size: int, rank: int, world_size: int) -> None:
        self.split, self.batch_size, self.rank, self.world_size = split, batch_size, rank, world_size

    def __len__(self) -> int:
        return math.ceil(len(self.split) / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[TextBatch]:
        for i in range(len(self)):
            start = (i * self.world_size + self.rank) * self.batch_size
            own = range(start, min(start + self.batch_size, len(self.split)))
            # A process whose share is all padding looks at some sample.
            yield padded(self.split, own or [0], self.batch_size, real=len(own))


def padded(
    split: TokenSplit, samples: Sequence[int] | np.ndarray, size: int, longest: int = 0, real: int | None = None
) -> TextBatch:
    """A batch of `size` samples, the last ones repetitions of the first where there are fewer.

    Args:
        longest: tokens that there is room for at least; room is made for the samples' own in any case.
        real: how many of the samples count; None: all.
    """
    chosen = np.resize(np.asarray(samples, np.int64), size)
    lengths = split.lengths[chosen]
    longest = min(split.max_length, -(-max(longest, int(lengths.max())) // _MULTIPLE) * _MULTIPLE)
    tokens = np.arange(longest) < lengths[:, None]
    places = np.concatenate([np.arange(split.starts[i], split.starts[i + 1]) for i in chosen])
    ids, types = (np.zeros((size, longest), np.int64) for _ in range(2))
    ids[tokens], types[tokens] = split.ids[places], split.types[places]
    counted = np.arange(size) < (len(samples) if real is None else real)
    arrays = (ids, types, tokens, split.labels[chosen], chosen, counted)
    return TextBatch._make([*map(torch.from_numpy, arrays), None])
